"""Accelerate, tasks from two data sets in turn: ``python -m examples.loops.accelerate_loop``.

Of one half of a survey's people the age is known, of the other sex, race and education; a batch of
one half follows a batch of the other. The wrapper is prepared as any optimizer, so ``save_state``
saves the posterior. ``accelerator.backward`` takes the one scalar.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bayesagg import BayesAggWrapper
from examples.loops import data
from examples.loops.data import SURVEY_LOSSES, SurveyNet

SETS = (("age",), ("sex", "race", "education"))


def losses_of(model: SurveyNet, tasks: tuple[str, ...], batch: list[Tensor]) -> dict[str, Tensor]:
    """Those of the tasks of a data set: the engine lets the others rest."""
    x, *targets = batch
    out = model(x, tasks)
    return {task: SURVEY_LOSSES[task](out[task], y) for task, y in zip(tasks, targets, strict=True)}


@data.in_one_line
def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = data.parser("accelerate_loop", epochs=10, lr=2e-3, output=Path("output/accelerate"))
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args(arguments)
    x, targets = data.survey()
    set_seed(args.seed)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate, mixed_precision=args.precision
    )
    train, test = data.split(len(x))
    loaders = [
        DataLoader(
            TensorDataset(x[rows], *(targets[task][rows] for task in tasks)),
            batch_size=32,
            shuffle=True,
        )
        for rows, tasks in zip(train.chunk(2), SETS, strict=True)
    ]
    net = SurveyNet(x.shape[1])
    wrapper = BayesAggWrapper(
        torch.optim.Adam(net.parameters(), lr=args.lr),
        shared_rep_hook=net.backbone,
        heads=net.described(),
        rule=args.rule,
    )
    model, optimizer, *loaders = accelerator.prepare(net, wrapper, *loaders)
    for _ in range(args.epochs):
        for batches in zip(*loaders, strict=True):
            for tasks, batch in zip(SETS, batches, strict=True):
                with accelerator.accumulate(model):
                    # `optimizer` is Accelerate's proxy; the wrapper makes the scalar.
                    accelerator.backward(wrapper.loss(losses_of(model, tasks, batch)))
                    optimizer.step()
                    optimizer.zero_grad()
    accelerator.save_state(args.output)
    model.eval()
    with torch.no_grad():
        batch = [x[test], *(targets[task][test] for task in SURVEY_LOSSES)]
        batch = [part.to(accelerator.device) for part in batch]
        found = losses_of(model, tuple(SURVEY_LOSSES), batch)
        losses = {task: float(loss) for task, loss in found.items()}
    accelerator.print("losses of the test part:", losses)
    accelerator.print("task weights of the last batch:", wrapper.task_weights)
    return losses


if __name__ == "__main__":
    main()

"""Accelerate, tasks from two data sets in turn: ``python -m examples.loops.accelerate_loop``.

Of one half of a survey's people the age is known, of the other sex, race and education; a batch of
one half follows a batch of the other. The wrapper is prepared as any optimizer, so ``save_state``
saves the posterior. ``accelerator.backward`` takes the one scalar.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from examples.data import DataUnavailableError
from examples.loops import data

SETS = (("age",), ("sex", "race", "education"))
LOSSES = {
    "age": F.mse_loss,
    "sex": F.binary_cross_entropy_with_logits,
    "race": F.binary_cross_entropy_with_logits,
    "education": F.cross_entropy,
}


class Model(nn.Module):
    """A shared network with a head per task; returns the outputs that are asked for."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(inputs, 64), nn.ELU(), nn.Linear(64, 32), nn.ELU())
        self.heads = nn.ModuleDict({t: nn.Linear(32, 5 if t == "education" else 1) for t in LOSSES})

    def forward(self, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        h = self.backbone(x)
        return {task: self.heads[task](h) for task in tasks}


def losses_of(model: nn.Module, tasks: tuple[str, ...], batch: list[Tensor]) -> dict[str, Tensor]:
    """Those of the tasks of a data set: the engine lets the others rest."""
    x, *targets = batch
    out = model(x, tasks)
    return {task: LOSSES[task](out[task], y) for task, y in zip(tasks, targets, strict=True)}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(prog="python -m examples.loops.accelerate_loop")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rule", choices=("likelihood", "paper"), default="likelihood")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/accelerate"))
    args = parser.parse_args(arguments)
    try:
        x, targets = data.survey()
    except DataUnavailableError as error:
        sys.exit(f"error: {error}")
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
    net = Model(x.shape[1])
    kinds = {"age": RegressionHead, "sex": BinaryHead, "race": BinaryHead}
    wrapper = BayesAggWrapper(
        torch.optim.Adam(net.parameters(), lr=args.lr),
        shared_rep_hook=net.backbone,
        heads={t: kinds.get(t, MulticlassHead)(head) for t, head in net.heads.items()},
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
        batch = [x[test], *(targets[task][test] for task in LOSSES)]
        batch = [part.to(accelerator.device) for part in batch]
        losses = {t: float(loss) for t, loss in losses_of(model, tuple(LOSSES), batch).items()}
    accelerator.print("losses of the test part:", losses)
    accelerator.print("task weights of the last batch:", wrapper.task_weights)
    return losses


if __name__ == "__main__":
    main()

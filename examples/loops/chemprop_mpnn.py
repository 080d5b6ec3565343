"""chemprop's message-passing network: ``python -m examples.loops.chemprop_mpnn``.

Properties of molecules of QM9 from their SMILES; labels are missing. chemprop's own
``training_step`` computes the loss, with its mask of missing labels, and the engine turns it into
the scalar that Lightning differentiates. The head is the last layer of its FFN predictor, which has
an output per property.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from chemprop import data as chem
from chemprop import featurizers, models, nn
from torch import Tensor

from bayesagg import BayesAgg, RegressionHead
from bayesagg.lightning import TaskWeightsCallback
from examples.loops import data

TASKS = ("mu", "alpha", "homo", "lumo", "cv")


class BayesAggMPNN(models.MPNN):
    """``chemprop.models.MPNN`` whose properties are weighed by what is known of them."""

    def __init__(self, *args: Any, rule: str = "likelihood", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        last = self.predictor.ffn[-1][-1]  # the linear layer of the FFN's last block
        self.engine = BayesAgg(None, {"properties": RegressionHead(last)}, rule=rule)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.engine({"properties": super().training_step(batch, batch_idx)})

    def on_train_epoch_end(self) -> None:
        self.engine.end_epoch()  # of the paper's rule; the default's knows no epochs


def make_model(rule: str, width: int) -> BayesAggMPNN:
    messages = nn.BondMessagePassing(d_h=width)
    predictor = nn.RegressionFFN(n_tasks=len(TASKS), input_dim=width, hidden_dim=width)
    return BayesAggMPNN(messages, nn.MeanAggregation(), predictor, rule=rule)


def loaders(args: argparse.Namespace) -> list[Any]:
    """Of the training and the test part; chemprop takes NaN for a missing label."""
    smiles, y = data.molecules(args.molecules, TASKS)
    known = data.without({"y": y}, args.missing)["y"]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    found = []
    for rows, targets in zip(data.split(len(smiles)), (known, y), strict=True):
        points = [chem.MoleculeDatapoint.from_smi(smiles[i], targets[i].numpy()) for i in rows]
        part = chem.MoleculeDataset(points, featurizer)
        found.append(chem.build_dataloader(part, batch_size=64, shuffle=targets is known))
    return found


@data.in_one_line
def main(arguments: list[str] | None = None) -> pl.Trainer:
    parser = data.parser(
        "chemprop_mpnn", molecules=1500, epochs=5, width=100, output=Path("output/chemprop")
    )
    parser.add_argument("--missing", type=float, default=0.3, help="share of missing labels")
    args = parser.parse_args(arguments)
    train, test = loaders(args)
    pl.seed_everything(args.seed)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        logger=pl.loggers.CSVLogger(args.output),
        log_every_n_steps=10,
        callbacks=[TaskWeightsCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = make_model(args.rule, args.width)
    trainer.fit(model, train)
    trainer.test(model, test, verbose=False)
    print("test:", {name: float(value) for name, value in trainer.callback_metrics.items()})
    weights = model.engine.task_weights["properties"]
    print("task weights:", dict(zip(TASKS, weights.tolist(), strict=True)))
    return trainer


if __name__ == "__main__":
    main()

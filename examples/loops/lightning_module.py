"""Lightning, automatic optimization: ``python -m examples.loops.lightning_module``.

Age, sex, race and education of the people of a survey, of which many labels are missing.
``training_step`` returns the one scalar. The engine is an attribute of the module, so Lightning's
checkpoints hold the posterior and restore it.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bayesagg import BayesAgg
from bayesagg.lightning import TaskWeightsCallback
from examples.loops import data
from examples.loops.data import SURVEY_LOSSES, SurveyNet


class Survey(pl.LightningModule):
    """A shared network with a head per task, and the engine."""

    def __init__(self, inputs: int, lr: float, rule: str = "likelihood") -> None:
        super().__init__()
        self.lr, self.net = lr, SurveyNet(inputs)
        self.engine = BayesAgg(self.net.backbone, self.net.described(), rule=rule)

    def losses(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Over the labels that there are; a task without any in this batch is left out."""
        x, *targets = batch
        losses = {}
        for (task, z), y in zip(self.net(x).items(), targets, strict=True):
            known = y != -100 if task == "education" else ~y.isnan()
            if task == "education" and known.any():
                losses[task] = F.cross_entropy(z, y, ignore_index=-100)
            elif known.any():
                losses[task] = SURVEY_LOSSES[task](z[known], y[known])
        return losses

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.engine(self.losses(batch))
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.engine.end_epoch()  # of the paper's rule; the default's knows no epochs

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        for task, loss in self.losses(batch).items():
            self.log(f"test {task}", loss, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@data.in_one_line
def main(arguments: list[str] | None = None) -> pl.Trainer:
    parser = data.parser("lightning_module", epochs=10, lr=2e-3, output=Path("output/lightning"))
    parser.add_argument("--missing", type=float, default=0.3, help="share of missing labels")
    parser.add_argument("--resume", help="a checkpoint of the Trainer")
    args = parser.parse_args(arguments)
    x, targets = data.survey(args.missing)
    train, test = (
        TensorDataset(x[r], *(y[r] for y in targets.values())) for r in data.split(len(x))
    )
    pl.seed_everything(args.seed)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        logger=pl.loggers.CSVLogger(args.output),
        log_every_n_steps=10,
        callbacks=[
            pl.callbacks.ModelCheckpoint(args.output, save_last=True),
            TaskWeightsCallback(),  # the weight of every task, to each logger
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Survey(x.shape[1], args.lr, args.rule),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(test, batch_size=256),
        ckpt_path=args.resume,
    )
    print({name: float(value) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()

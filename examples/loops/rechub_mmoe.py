"""torch-rechub's MMoE on MovieLens 100k: ``python -m examples.loops.rechub_mmoe``.

How many stars a user gives a film, and whether the user likes it (four stars or more); split by
time. torch-rechub's ``MTLTrainer`` has no hook for the loss, so its ``train_one_epoch`` is
overridden; its evaluation, early stopping and logging go on as they are. (Its ``metabalance`` would
leave the gradients to an object of one's own, but in 0.9.0 it ends in an ``UnboundLocalError``.)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch_rechub.basic.features import SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MTLTrainer

from bayesagg import BayesAggWrapper, BinaryHead, RegressionHead
from examples.data.movielens import ITEMS, LIKED, USERS, load_movielens
from examples.loops import data

TASKS = {"rating": "regression", "liked": "classification"}


class BayesAggTrainer(MTLTrainer):
    """Trains by the wrapper; a tower's last layer is its task's head."""

    def __init__(self, model: MMOE, task_types: list[str], **kwargs: Any) -> None:
        super().__init__(model, task_types, **kwargs)
        kinds = {"regression": RegressionHead, "classification": BinaryHead}
        heads = [kinds[k](t.mlp[-1]) for k, t in zip(task_types, model.towers, strict=True)]
        self.optimizer = BayesAggWrapper(self.optimizer, None, heads)

    def train_one_epoch(self, data_loader: DataLoader) -> list[float]:
        self.model.train()
        total = torch.zeros(self.n_task)
        for x, targets in data_loader:
            x = {name: column.to(self.device) for name, column in x.items()}
            out, targets = self.model(x), targets.to(self.device)
            # The probabilities of its output layer, and its own losses, one per head in order.
            losses = [f(out[:, k], targets[:, k]) for k, f in enumerate(self.loss_fns)]
            self.optimizer.zero_grad()
            self.optimizer.step(losses)
            total += torch.stack(losses).detach().cpu()
        return (total / len(data_loader)).tolist()


def loaders(args: argparse.Namespace) -> list[DataLoader]:
    """Of the first four fifths of the ratings, and of what was rated later."""
    films = load_movielens()
    liked = (films.ratings >= LIKED).float()
    targets = torch.stack([films.ratings, liked], 1)
    cut = int(0.8 * len(targets))
    train, test = slice(max(cut - args.ratings, 0), cut), slice(cut, cut + args.ratings)
    mean = targets[train, 0].mean()
    targets[:, 0] -= mean  # the towers begin near zero
    # As torch-rechub wants them: a dictionary of features, and the targets ``(2,)``.
    parts = zip(films.users, films.items, targets, strict=True)
    ratings = [({"user": user, "item": item}, y) for user, item, y in parts]
    return [
        DataLoader(ratings[rows], batch_size=256, shuffle=rows is train) for rows in (train, test)
    ]


def make_trainer(args: argparse.Namespace) -> BayesAggTrainer:
    torch.manual_seed(args.seed)
    features = [
        SparseFeature("user", vocab_size=USERS + 1, embed_dim=16),
        SparseFeature("item", vocab_size=ITEMS + 1, embed_dim=16),
    ]
    model = MMOE(
        features,
        list(TASKS.values()),
        n_expert=4,
        expert_params={"dims": [32]},
        tower_params_list=[{"dims": [16]} for _ in TASKS],
    )
    return BayesAggTrainer(
        model,
        list(TASKS.values()),
        optimizer_params={"lr": args.lr, "weight_decay": 1e-5},
        n_epoch=args.epochs,
        earlystop_taskid=1,  # by the area under the curve of `liked`
        model_path=str(args.output),
    )


@data.in_one_line
def main(arguments: list[str] | None = None) -> tuple[list[list[float]], list[float]]:
    parser = data.parser("rechub_mmoe", rule=False, epochs=3, lr=1e-3, output=Path("output/rechub"))
    parser.add_argument("--ratings", type=int, default=80_000, help="the last ones before the cut")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)  # its trainer saves the model there
    train, test = loaders(args)
    trainer = make_trainer(args)
    log = trainer.fit(train, test)
    scores = trainer.evaluate(trainer.model, test)
    print(f"test: RMSE of rating {scores[0] ** 0.5:.4f}, AUROC of liked {scores[1]:.4f}")
    print("task weights:", trainer.optimizer.task_weights)
    return log, scores


if __name__ == "__main__":
    main()

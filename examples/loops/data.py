"""Small real data for the scripts beside it: a survey, molecules as text, two digits in an image.

Each comes with a package and needs no download; replace it by your own. Also what the scripts on
the survey share, a network and its losses, and the arguments of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from examples.arguments import Parser
from examples.data import DataUnavailableError, read_digits, read_survey, split_indices
from examples.data.qm9 import TARGETS, read_frame

Targets = dict[str, Tensor]
SURVEY_LOSSES = {
    "age": F.mse_loss,
    "sex": F.binary_cross_entropy_with_logits,
    "race": F.binary_cross_entropy_with_logits,
    "education": F.cross_entropy,
}


class SurveyNet(nn.Module):
    """A shared network with a head per task of the survey."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(inputs, 64), nn.ELU(), nn.Linear(64, 32), nn.ELU())
        widths = {"age": 1, "sex": 1, "race": 1, "education": 5}
        self.heads = nn.ModuleDict({task: nn.Linear(32, width) for task, width in widths.items()})

    def described(self) -> dict[str, Any]:
        """The heads, for the wrapper or the engine."""
        return {
            "age": RegressionHead(self.heads["age"]),
            "sex": BinaryHead(self.heads["sex"]),
            "race": BinaryHead(self.heads["race"]),
            "education": MulticlassHead(self.heads["education"]),
        }

    def forward(self, x: Tensor, tasks: tuple[str, ...] = tuple(SURVEY_LOSSES)) -> Targets:
        """Outputs of the tasks that are asked for."""
        h = self.backbone(x)
        return {task: self.heads[task](h) for task in tasks}


def parser(script: str, *, rule: bool = True, **defaults: Any) -> Parser:
    """Arguments by their defaults, a seed, and the rule where a script offers it."""
    made = Parser(f"loops.{script}", None)
    for name, default in {"seed": 0, **defaults}.items():
        made.option(name, default)
    if rule:
        made.add_argument("--rule", choices=("likelihood", "paper"), default="likelihood")
    return made


def in_one_line(main: Callable[..., Any]) -> Callable[..., Any]:
    """``main``, which then ends in one line where its data are not there."""

    @wraps(main)
    def run(arguments: list[str] | None = None) -> Any:
        try:
            return main(arguments)
        except DataUnavailableError as error:
            sys.exit(f"error: {error}")

    return run


def survey(missing: float = 0.0, seed: int = 0) -> tuple[Tensor, Targets]:
    """NHEFS, 1,629 people: standardised answers ``(n, inputs)``, and four targets.

    ``age`` is standardised, ``(n, 1)``; ``sex`` and ``race`` are 0 or 1, ``(n, 1)``; ``education``
    is one of five classes, ``(n,)``. A share ``missing`` of each is taken away: NaN, class −100.
    """
    answers, known = read_survey()
    x = torch.from_numpy(answers.fillna(answers.median()).to_numpy())
    x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6)).clamp(-6, 6).float()
    age, sex, race, education = torch.from_numpy(known.to_numpy("float32")).split(1, dim=1)
    age = (age - age.mean()) / age.std()
    targets = {"age": age, "sex": sex, "race": race, "education": education[:, 0].long()}
    return x, without(targets, missing, seed)


def without(targets: Targets, share: float, seed: int = 0) -> Targets:
    """Targets of which a random share is missing: NaN, or −100 for a class."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, y in targets.items():
        gaps = torch.rand(y.shape, generator=generator) < share
        found[name] = y.masked_fill(gaps, torch.nan if y.is_floating_point() else -100)
    return found


def molecules(count: int, names: tuple[str, ...], seed: int = 0) -> tuple[list[str], Tensor]:
    """SMILES of molecules of QM9, and targets of :data:`TARGETS`, standardised, ``(n, names)``."""
    columns = {target.name: target.column for target in TARGETS}
    frame = read_frame("SMILES").sample(count, random_state=seed)
    y = torch.from_numpy(frame[[columns[name] for name in names]].to_numpy("float64"))
    return list(frame["SMILES"]), ((y - y.mean(0)) / y.std(0)).float()


def two_digits(count: int, seed: int = 0) -> tuple[np.ndarray, Targets]:
    """Two real digits of MNIST, overlaid: images ``(n, 36, 36)``, uint8, and both classes."""
    pixels, classes = read_digits()
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(len(classes), (2, count), generator=generator)
    digits = pixels.byte().view(-1, 28, 28)
    images = torch.maximum(F.pad(digits[left], (0, 8, 0, 8)), F.pad(digits[right], (8, 0, 8, 0)))
    return images.numpy(), {"left": classes[left], "right": classes[right]}


def split(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to train on, four fifths, and rows to test."""
    train, val, test = split_indices(count, val_fraction=0.1, test_fraction=0.1, seed=seed)
    return train, torch.cat([val, test])

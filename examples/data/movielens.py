"""MovieLens 100k from the package ``recbole``: who rated which film how, and when.

100,000 ratings of 1,682 films by 943 users between September 1997 and April 1998 (Harper and
Konstan, "The MovieLens Datasets: History and Context", 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from examples.data import package_file

USERS, ITEMS, RATINGS = 943, 1_682, 100_000
LIKED = 4.0  # the lowest rating of a film that is liked
# The package asks for versions that do not install beside others, and only its file is read.
_REQUIREMENT = "--no-deps recbole==1.2.1"
_FILE = "dataset_example/ml-100k/ml-100k.inter"
_COLUMNS = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]


@dataclass(frozen=True)
class MovieLens:
    """The ratings in the order of time, those of one second as in the file; each ``(n,)``."""

    users: Tensor  # 1 to 943, int64
    items: Tensor  # films, 1 to 1,682, int64
    ratings: Tensor  # stars, 1 to 5, float32
    times: Tensor  # seconds since 1970, int64, rising


def load_movielens(path: Path | None = None) -> MovieLens:
    """Read the ratings; ``recbole`` is found without being imported.

    Args:
        path: The file ``ml-100k.inter``; ``None``: that of the package.

    Raises:
        DataUnavailableError: If the package is not installed, or without its file.
        ValueError: If the file is not MovieLens 100k as RecBole writes it.
    """
    path = path or package_file("recbole", _FILE, _REQUIREMENT)
    table = pd.read_csv(path, sep="\t")
    if list(table.columns) != _COLUMNS:
        raise ValueError(f"{path}: the columns are {list(table.columns)}, not {_COLUMNS}")
    if len(table) != RATINGS:
        raise ValueError(f"{path}: {len(table)} ratings, not {RATINGS}: the file is incomplete")
    for column, low, high in zip(_COLUMNS, (1, 1, 1, 0), (USERS, ITEMS, 5, 2**31), strict=True):
        values = pd.to_numeric(table[column], errors="coerce")
        wrong = ~(values.between(low, high) & (values % 1 == 0))
        if wrong.any():
            row = int(wrong.idxmax())
            raise ValueError(
                f"{path}, line {row + 2}: {column} is {table[column][row]}, not a whole number "
                f"from {low} to {high}"
            )
    table = table.sort_values(_COLUMNS[3], kind="stable")
    users, items, ratings, times = (torch.tensor(table[c].to_numpy("int64")) for c in _COLUMNS)
    return MovieLens(users, items, ratings.float(), times)

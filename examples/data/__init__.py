"""Data sets of the examples, each as standardised tensors with a train/validation/test split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DATA_VARIABLE = "BAYESAGG_DATA"  # folder of downloaded data sets, one subfolder each


class DataUnavailableError(RuntimeError):
    """The data set is not on this computer; the message says how to get it."""


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    x: Tensor  # inputs, shape ``(n, …)``
    y: Tensor  # targets, shape ``(n, K)``, one column per task

    def __len__(self) -> int:
        """Number of data."""
        return len(self.x)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given rows."""
        return self.x[rows], self.y[rows]

    def to(self, device: str) -> Split:
        """The part on a device."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Moved:
    """A part that is read batch by batch, each moved to a device."""

    part: Any
    device: str

    def __len__(self) -> int:
        """Number of data."""
        return len(self.part)

    def __getattr__(self, name: str) -> Any:
        """What the part has besides."""
        return getattr(self.part, name)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given rows, on the device."""
        x, y = self.part.batch(rows)
        return x.to(self.device), y.to(self.device)


def split_indices(
    count: int, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle ``range(count)`` and cut it into training, validation and test indices.

    Args:
        count: Number of data.
        val_fraction: Share of the data in the validation part, rounded down.
        test_fraction: Share of the data in the test part, rounded down; the rest is for training.
        seed: Seed of the permutation. It does not touch the global random state.

    Returns:
        Disjoint indices of the training, validation and test part that together cover all data.

    Raises:
        ValueError: Where a part would be empty.
    """
    n_val, n_test = int(count * val_fraction), int(count * test_fraction)
    n_train = count - n_val - n_test
    if min(n_train, n_val, n_test) < 1:
        raise ValueError(
            f"{count} data leave an empty part (training {n_train}, validation {n_val}, "
            f"test {n_test}); use more data or other fractions"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, val, test = order.split([n_train, n_val, n_test])
    return train, val, test

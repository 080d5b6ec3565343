"""Leaves of a checkpoint, each checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayesagg.errors import CheckpointError

__all__ = ["check", "check_keys", "scalar_leaf", "tensor_leaf"]

Number = TypeVar("Number", bool, int, float)
_REMEDY = (
    "Build model, heads, rule and optimizer as they were; if they are, it is damaged or of another "
    "version."
)


def check(holds: bool, what: str) -> None:
    """Raise a :class:`CheckpointError` that says ``what`` is wrong, unless a condition holds."""
    if not holds:
        raise CheckpointError(f"the checkpoint cannot be loaded: {what}. {_REMEDY}")


def check_keys(state: Any, keys: Iterable[str], what: str) -> None:
    """A dictionary has these keys and no others."""
    check(isinstance(state, dict) and state.keys() == set(keys), f"{what} is incomplete")


def scalar_leaf(value: Any, kind: type[Number], what: str, minimum: float | None = None) -> Number:
    """A plain finite number, or boolean, of the given type, not below a minimum."""
    check(type(value) is kind and math.isfinite(value), f"{what} is {value!r}")
    check(minimum is None or value >= minimum, f"{what} is {value!r}, below {minimum}")
    return value  # type: ignore[no-any-return]


def tensor_leaf(
    value: Any, shape: Sequence[int], like: Tensor, what: str, minimum: float | None = None
) -> Tensor:
    """A copy of a finite tensor of the given shape, in the device and dtype of ``like``."""
    check(isinstance(value, Tensor), f"{what} is a {type(value).__name__}, not a tensor")
    check(
        tuple(value.shape) == tuple(shape),
        f"{what} has shape {tuple(value.shape)}, these heads need {tuple(shape)}",
    )
    check(
        value.is_floating_point() == like.is_floating_point() and not value.is_complex(),
        f"{what} is of type {value.dtype}",
    )
    check(bool(torch.isfinite(value).all()), f"{what} is not finite")
    check(minimum is None or bool((value >= minimum).all()), f"{what} has an entry below {minimum}")
    copy: Tensor = value.detach().to(like.device, like.dtype, copy=True)
    return copy

"""Targets in the layout of the outputs that they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesagg.errors import TargetError
from bayesagg.reading.hooks import flatten
from bayesagg.reading.observed import Said

__all__ = ["Targets", "beside_outputs", "flat_target", "raise_infinite"]


class Targets(NamedTuple):
    """Targets of heads side by side.

    Attributes:
        target: in the layout of the outputs; finite where missing.
        present: ``[N, K]``; ``None``: all, or else they are not valid.
        valid: booleans.
    """

    target: Tensor
    present: Tensor | None
    valid: Tensor


def flat_target(said: Said) -> Tensor:
    """Targets of a head as ``[N]`` (no dimension of outputs) or ``[N, c]``."""
    output, target = said.calls[0].output, said.target
    assert target is not None
    if target.device != output.device:
        target = target.to(output.device)
    if target.dim() == 2 and output.dim() == 2:
        return target
    if target.dim() < output.dim():
        return target.reshape(-1)
    return flatten(target, said.layout.channels_first)


def beside_outputs(saids: list[Said], like: Tensor) -> Tensor:
    """One target per output of every head, in the layout and dtype of ``like``, ``[N, K]``.

    Raises:
        TargetError: if the shape fits neither ``[N, o]`` nor, for one output, ``[N]``.
    """
    flat = []
    for said in saids:
        y, shape = flat_target(said), (len(like), said.layout.outputs)
        if y.dim() == 1 and shape[1] == 1:
            y = y[:, None]
        if tuple(y.shape) != shape:
            raise TargetError(
                f"task {said.name!r}: targets flatten to {list(y.shape)}, the head's output to "
                f"{list(shape)}. Pass one target per output of the head{_of_all_calls(said)}."
            )
        flat.append(y)
    together = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
    return together if together.dtype == like.dtype else together.to(like.dtype)


def _of_all_calls(said: Said) -> str:
    calls = len(said.calls)
    return "" if calls == 1 else f", those of its {calls} calls below each other in their order"


def raise_infinite(said: Said) -> None:
    """Say that a target is infinite, if one is.

    Raises:
        TargetError: if so.
    """
    assert said.target is not None
    if bool(said.target.isinf().any()):
        raise TargetError(f"task {said.name!r}: a target is infinite. Use NaN for a missing label.")

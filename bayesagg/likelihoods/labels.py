"""Helpers for reading labels: shapes, masks, and the factor of a loss whose targets are given."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.errors import TargetError

__all__ = ["check_shape", "close", "factor_of_targets", "label_mask", "tolerance"]


def tolerance(dtype: torch.dtype) -> float:
    """Relative error allowed when a loss is checked: rounding of the output's dtype, amplified."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def close(value: Tensor, loss: Tensor, tol: float) -> Tensor:
    """Whether a loss has the value that its likelihood and the recovered labels give it."""
    return (value - loss).abs() <= tol * torch.maximum(value.abs(), loss.abs())


def check_shape(name: str, target: Tensor | None, output: Tensor) -> Tensor:
    """Targets as ``[N, o]``, in their own precision where the output is of lower precision.

    Raises:
        TargetError: if the shape fits neither ``[N, o]`` nor, for one output, ``[N]``.
    """
    assert target is not None
    if target.dim() == 1 and output.shape[1] == 1:
        target = target[:, None]
    if target.shape != output.shape:
        raise TargetError(
            f"task {name!r}: targets flatten to {list(target.shape)}, the head's output to "
            f"{list(output.shape)}. Pass one target per output of the head."
        )
    return target.to(torch.promote_types(target.dtype, output.dtype))


def label_mask(name: str, target: Tensor, missing: Tensor) -> Tensor | None:
    """Present labels, ``None`` where all are; the others must be finite.

    Raises:
        TargetError: for an infinite target.
    """
    if torch.isinf(target).any():
        raise TargetError(f"task {name!r}: a target is infinite. Use NaN for a missing label.")
    return ~missing if bool(missing.any()) else None


def factor_of_targets(
    name: str, gradient: Tensor, residual: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Per-datum factor ``f`` with ``gradient = f · residual``, where the targets are known.

    For a loss of the head's own likelihood this is its weight, per example or constant; for
    another loss (Huber, focal) it is the weight that reproduces its gradient at the head's output,
    as in iteratively reweighted least squares. Data whose loss has no gradient although the
    residual has (masked out by the user) count as missing.

    Args:
        name: of the task, for errors.
        gradient: ``∂loss/∂output``, ``[N, K, C]``.
        residual: derivative of the likelihood of factor one, ``[N, K, C]``.
        present: ``[N, K]`` booleans or ``None``.

    Returns:
        factor ``[N, K]`` and the labels present.

    Raises:
        TargetError: if the gradient points away from the targets.
    """
    r2 = residual.square().sum(-1)
    known = r2 > 16 * torch.finfo(r2.dtype).eps ** 2 * (1 + r2.amax())
    if present is not None:
        known = known & present
    ratio = (gradient * residual).sum(-1) / torch.where(known, r2, torch.ones_like(r2))
    ratio = torch.where(known, ratio, torch.zeros_like(ratio))
    typical = ratio.sum(0, keepdim=True) / known.sum(0, keepdim=True).clamp(min=1)
    if bool((ratio < -1e-3 * ratio.abs().amax()).any()):
        raise TargetError(
            f"task {name!r}: the gradient of its loss points away from `targets`: they are not "
            f"the labels this loss was computed with, or the loss does not decrease towards them. "
            f"With label smoothing the targets are the smoothed probabilities; an activation on a "
            f"regression head's output does not fit."
        )
    masked = known & (ratio <= 0)
    # Where the residual is zero to rounding the factor cannot be read off: use the task's mean.
    typical = torch.where(typical > 0, typical, torch.full_like(typical, 1 / len(gradient)))
    factor = torch.where(known & ~masked, ratio, typical.expand_as(ratio))
    if bool(masked.any()):
        present = ~masked if present is None else present & ~masked
    return factor, present

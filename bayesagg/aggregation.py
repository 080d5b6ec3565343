"""Precision-weighted combination of task gradients (Eq. 5-7), on plain tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bayesagg.posterior import _cholesky

__all__ = [
    "GradientScale",
    "aggregate_diagonal",
    "aggregate_full",
    "aggregate_relative",
]

GradientScale = Literal["sum", "mean"]


def _count(mean: Tensor, present: Tensor | None) -> Tensor | int:
    """Number of tasks with a label, per datum ``[N, 1]`` where it varies."""
    return mean.shape[1] if present is None else present.sum(1, keepdim=True)


def aggregate_diagonal(
    mean: Tensor,
    log_variance: Tensor,
    s: Tensor,
    present: Tensor | None = None,
    scale: GradientScale = "sum",
) -> tuple[Tensor, Tensor]:
    """Eq. 7 with exponent ``s``: ``g = Σ_k α_k μ_k``, ``α = softmax_k(-s_k log Var_k)``.

    The softmax is taken in log space, so that no variance is clamped.

    Args:
        mean: ``μ``, ``[N, K, d]``.
        log_variance: ``log Var``, ``[N, K, d]``, finite.
        s: exponent of each task, ``[K]``; 0 gives uniform weights.
        present: ``[N, K]`` booleans; tasks without a label have no say for that datum.
        scale: ``"mean"`` is Eq. 7 as printed; ``"sum"`` multiplies it by the number of tasks
            present, so that uniform weights are linear scalarization.

    Returns:
        ``g``, ``[N, d]``, and ``α``, ``[N, K, d]``, which sums to one over the present tasks.
    """
    return _weighted(mean, log_variance * -s[:, None], present, scale)


def aggregate_relative(
    mean: Tensor,
    relative: Tensor,
    log_scale: Tensor,
    s: Tensor | float,
    present: Tensor | None = None,
    scale: GradientScale = "sum",
) -> tuple[Tensor, Tensor]:
    """:func:`aggregate_diagonal` for ``Var = relative · exp(log_scale)``, in fewer passes.

    Args:
        mean: ``[N, K, d]``.
        relative: positive, ``[N, K, d]``; overwritten.
        log_scale: ``[N, K, 1]``.
        s: as in :func:`aggregate_diagonal`, or a number for all tasks.
        present: ``[N, K]`` booleans or ``None``.
        scale: ``"sum"`` or ``"mean"``.

    Returns:
        ``g``, ``[N, d]``, and ``α``, ``[N, K, d]``.
    """
    if isinstance(s, Tensor):
        power = -s[:, None]
        score = torch.addcmul(log_scale * power, relative.log_(), power)
    else:
        score = torch.add(log_scale * -s, relative.log_(), alpha=-s)
    return _weighted(mean, score, present, scale)


def _weighted(
    mean: Tensor, score: Tensor, present: Tensor | None, scale: GradientScale
) -> tuple[Tensor, Tensor]:
    """Softmax of the scores over the tasks, and the means under it."""
    if present is not None:
        score = score.masked_fill_(~present[..., None], -torch.inf)
        mean = mean.masked_fill(~present[..., None], 0)
    # The blocks have the tasks outermost in memory, where no copy is needed for the softmax.
    weights = torch.softmax(score.transpose(0, 1), 0).transpose(0, 1)
    if present is not None:
        weights.nan_to_num_()  # NaN: no task present at all
    gradient = (weights * mean).sum(1)
    return (gradient * _count(mean, present) if scale == "sum" else gradient), weights


def aggregate_full(
    mean: Tensor,
    covariance: Tensor,
    s: Tensor,
    present: Tensor | None = None,
    scale: GradientScale = "sum",
) -> tuple[Tensor, Tensor]:
    """Eq. 6, ``g = (Σ_k Λ_k)⁻¹ Σ_k Λ_k μ_k``, with ``Λ_k = Cov_k^{-s_k}`` (matrix power).

    At ``s = 1`` this is Eq. 6 as printed; Eq. 7 with exponent is its restriction to diagonal
    covariances.

    Args:
        mean: ``[N, K, d]``.
        covariance: ``[N, K, d, d]``, positive semi-definite.
        s: ``[K]``.
        present: ``[N, K]`` booleans or ``None``.
        scale: as in :func:`aggregate_diagonal`.

    Returns:
        ``g``, ``[N, d]``, and the diagonals of ``(Σ_j Λ_j)⁻¹ Λ_k``, ``[N, K, d]``.
    """
    n, k, d = mean.shape
    # A direction without any variance would have infinite precision: lift it to rounding, of its
    # own task or, where that has none at all, far below that of the others.
    limits = torch.finfo(covariance.dtype)
    level = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)  # [N, K]
    floor = level * (d * limits.eps) + level.amax(1, keepdim=True) * limits.eps**2 + limits.tiny
    identity = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    covariance = covariance + floor[..., None, None] * identity
    if bool((s == 1).all()):
        factor = _cholesky(covariance.flatten(0, 1))
        precision = torch.cholesky_inverse(factor).view(n, k, d, d)
    else:
        values, vectors = torch.linalg.eigh(covariance)
        power = values.clamp(min=floor[..., None]).pow(-s[:, None])
        precision = (vectors * power[..., None, :]) @ vectors.mT
    if present is not None:
        precision = precision * present[..., None, None]
        mean = mean.masked_fill(~present[..., None], 0)
    total = precision.sum(1)
    if present is not None:  # a datum without any label gets a zero gradient
        total = total + torch.diag_embed((~present.any(1))[:, None].expand(n, d).to(total.dtype))
    factor = _cholesky(total)
    rhs = (precision @ mean[..., None]).sum(1)
    gradient = torch.cholesky_solve(rhs, factor)[..., 0]
    shares = torch.cholesky_solve(precision, factor[:, None].expand_as(precision))
    weights = shares.diagonal(dim1=-2, dim2=-1)
    return (gradient * _count(mean, present) if scale == "sum" else gradient), weights

"""The paper's sampling estimate of the moments (Eq. 11), for any classification head."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.moments.common import LogMoments
from bayesagg.posterior import Gaussian, contrast_basis

__all__ = ["monte_carlo_moments", "sampled_log_moments"]

_CHUNK = 1 << 22  # elements of the largest intermediate


def monte_carlo_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    num_samples: int,
    generator: torch.Generator | None = None,
    full: bool = False,
) -> tuple[Tensor, Tensor]:
    """Moments of ``g`` from ``J`` weight samples (Eq. 11).

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: probabilities: ``[N, K]`` for ``K`` binary outputs, ``[N, 1, C]`` for one
            multi-class task.
        posterior: of ``K`` outputs over ``D`` weights, or of one task over ``E·D``
            contrast weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        num_samples: ``J``, at least 2.
        generator: source of the samples.
        full: return the covariance instead of its diagonal.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    multiclass = targets.dim() == 3
    w = posterior.sample(num_samples, generator).unflatten(-1, (-1, features.shape[1]))
    if multiclass:
        w = contrast_basis(targets.shape[2], w).mT @ w
    else:
        targets = targets[..., None]
    size = max(1, _CHUNK // (num_samples * w.shape[1] * (w.shape[2] + d)))
    parts = []
    for h, y in zip(features.split(size), targets.split(size), strict=True):
        z = torch.einsum("jkcw,nw->njkc", w, h)
        p = torch.softmax(z, dim=-1) if multiclass else torch.sigmoid(z)
        g = torch.einsum("njkc,jkcd->njkd", p - y[:, None], w[..., :d])
        mean = g.mean(1)
        g = g - mean[:, None]
        second = torch.einsum("njkd,njke->nkde", g, g) if full else g.square_().sum(1)
        parts.append((mean, second / num_samples))
    mean, second = map(torch.cat, zip(*parts, strict=True))
    return mean, second


def sampled_log_moments(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> LogMoments:
    """Sampled moments in ``dtype``, relative to the largest variance of each task and datum.

    Args:
        mean: ``[N, K, d]``, or ``[N, d]`` of one task.
        variance: of the same shape; what vanishes beside the largest is lifted to the least number.
        dtype: of the result.
    """
    tiny = torch.finfo(variance.dtype).tiny
    scale = variance.amax(-1, keepdim=True).clamp(min=tiny)
    relative = (variance / scale).clamp_(min=torch.finfo(dtype).tiny)
    return LogMoments(mean.to(dtype), relative.to(dtype), scale.log().to(dtype))

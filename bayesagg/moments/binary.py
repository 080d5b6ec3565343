"""Binary cross-entropy: moments by one-dimensional quadrature over the logit."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.moments.common import LogMoments, variance_of, whitened
from bayesagg.moments.nodes import gaussian_nodes
from bayesagg.posterior import Gaussian

__all__ = ["binary_log_moments", "binary_moments"]


def binary_moments(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, full: bool = False
) -> tuple[Tensor, Tensor]:
    """Moments of ``g = (σ(z) - y) w``, ``z = h̃ᵀw``, for ``w ~ N(m, S)``.

    Given the standardised logit ``x = (z - m_z)/√v`` the weights are normal with mean
    ``m + ρ x``, ``ρ = S h̃/√v``, and variance ``S_dd - ρ²``, so five expectations over ``x`` give
    both moments. With ``e = σ(z) - y`` and ``Σ = Cov(e, e x)``::

        E[g]   = E[e] m + E[e x] ρ
        Var[g] = Σ_00 m² + 2 Σ_01 m ρ + Σ_11 ρ² + E[e²] (S_dd - ρ²)

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: probabilities ``[N, K]``.
        posterior: of ``K`` outputs over ``D`` weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    if full:
        return _covariances(features, targets, posterior, d)
    return variance_of(binary_log_moments(features, targets, posterior, d))


def binary_log_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    dtype: torch.dtype | None = None,
) -> LogMoments:
    """:func:`binary_moments` in ``dtype``, by default that of the posterior.

    The quadratic form is written as ``E[e²]`` times a sum of squares (``Σ`` is positive
    semi-definite), ``(root m + slope ρ)² + rest ρ² + (S_dd - ρ²)``, exact to rounding of ``S_dd``;
    ``v → 0`` needs no special case because ``|ρ| ≤ √S_dd``.
    """
    dtype = posterior.mean.dtype if dtype is None else dtype
    mean, second, along, rest, rho, variance = _conditional(features, targets, posterior, d, dtype)
    relative = torch.addcmul(variance, rho.square_(), rest.sub_(1))
    relative = relative.addcmul_(along, along).clamp_(min=torch.finfo(dtype).tiny)
    log_scale = second.clamp(min=torch.finfo(second.dtype).tiny).log_().to(dtype)
    return LogMoments(*(part.transpose(0, 1) for part in (mean, relative, log_scale)))


def _covariances(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int
) -> tuple[Tensor, Tensor]:
    mean, second, along, rest, rho, _ = _conditional(
        features, targets, posterior, d, posterior.mean.dtype
    )
    outer = rho[..., :, None] * rho[..., None, :]
    s = posterior.covariance[:, None, :d, :d]
    cov = along[..., :, None] * along[..., None, :] + rest[..., None] * outer + (s - outer)
    return mean.transpose(0, 1), (second[..., None] * cov).transpose(0, 1)


def _conditional(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``E[g]``, ``E[e²]``, ``root m + slope ρ``, ``rest``, ``ρ`` and ``S_dd``, tasks first."""
    sd, rho, variance = whitened(features, posterior, d, dtype)
    z = (features @ posterior.mean.mT).mT[..., None]
    first, second, sigma = _residual_moments(z, sd.expand_as(z), targets.mT[..., None])
    tiny = torch.finfo(sd.dtype).tiny
    s00, s01, s11 = (value / second.clamp(min=tiny) for value in sigma)
    root = s00.sqrt()
    slope = s01 / root.clamp(min=tiny)
    rest = (s11 - slope.square()).clamp(min=0)
    c0, c1, root, slope, rest = (value.to(dtype) for value in (*first, root, slope, rest))
    m = posterior.mean[:, None, :d].to(dtype)
    mean, along = torch.addcmul(rho * c1, m, c0), torch.addcmul(rho * slope, m, root)
    return mean, second, along, rest, rho, variance


def _residual_moments(
    z: Tensor, sd: Tensor, targets: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``(E[e], E[e x])``, ``E[e²]`` and ``Σ_00, Σ_01, Σ_11``, of the shape of ``z``, ``[…, 1]``."""
    x, w = gaussian_nodes(z[..., 0], sd[..., 0])
    # σ(z) - y from the side of the label, where no digits are lost: s (σ(s z) - min(y, 1 - y)).
    side = torch.where(targets > 0.5, -1.0, 1.0).to(z.dtype)
    soft = torch.minimum(targets, 1 - targets)
    e = torch.sigmoid(torch.addcmul(z, sd, x).mul_(side)).sub_(soft).mul_(side)
    ex = e * x
    c0, c1, second = _mean(w, e), _mean(w, ex), _mean(w, e.square())
    e, ex = e.sub_(c0), ex.sub_(c1)
    sigma = _mean(w, e.square()), _mean(w, e * ex), _mean(w, ex.square())
    return (c0, c1), second, sigma


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum over the nodes, which come last; that dimension is kept."""
    if weights.dim() == 1:
        return values @ weights[:, None]
    return (weights * values).sum(-1, keepdim=True)

"""Squared error: both moments in closed form (Eq. 4), never a d×d matrix per datum."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.moments.common import LogMoments, variance_of, whitened
from bayesagg.posterior import Gaussian

__all__ = ["regression_log_moments", "regression_moments"]


def regression_moments(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, full: bool = False
) -> tuple[Tensor, Tensor]:
    """Moments of ``g = 2 w (h̃ᵀw - y)`` for ``w ~ N(m, S)``.

    With ``u = S h̃``, ``v = h̃ᵀ S h̃``, ``r = h̃ᵀm - y``::

        E[g]   = 2 (u + m r)
        Var[g] = 4 (m² v + 2 m r u + S_dd (r² + v) + u²)
        Cov[g] = 4 (v m mᵀ + r (m uᵀ + u mᵀ) + (r² + v) S + u uᵀ)

    which equals Eq. 4 minus the outer product of the mean.

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: ``[N, K]``.
        posterior: of ``K`` outputs over ``D`` weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    if full:
        return _covariances(features, targets, posterior, d)
    return variance_of(regression_log_moments(features, targets, posterior, d))


def regression_log_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    dtype: torch.dtype | None = None,
) -> LogMoments:
    """:func:`regression_moments` in ``dtype``, by default that of the posterior.

    The variance is computed as a sum of squares, exact to rounding of ``S_dd``: with ``ρ = u/√v``,
    ``q² = r² + v``, ``a = r/q``, ``b = √v/q`` it is
    ``4 q² ((b m + a ρ)² + (S_dd - ρ²) + 2 b² ρ²)``, and ``|ρ| ≤ √S_dd``.
    """
    dtype = posterior.mean.dtype if dtype is None else dtype
    tiny = torch.finfo(dtype).tiny
    m = posterior.mean[:, None, :d].to(dtype)
    r = _residuals(features, targets, posterior).to(dtype)
    sd, rho, variance = whitened(features, posterior, d, dtype)
    sd = sd.to(dtype)
    mean = torch.addcmul(rho * (2 * sd), m, 2 * r)
    q = torch.hypot(r, sd).clamp_(min=tiny)
    b = sd / q
    along = torch.addcmul(rho * (r / q), m, b)
    squared = rho.square()
    rest = (variance - squared).clamp_(min=tiny)
    relative = torch.addcmul(rest, squared, 2 * b.square()).addcmul_(along, along)
    log_scale = (2 * q).log_().mul_(2)
    return LogMoments(*(part.transpose(0, 1) for part in (mean, relative, log_scale)))


def _covariances(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int
) -> tuple[Tensor, Tensor]:
    m = posterior.mean[:, None, :d]
    r = _residuals(features, targets, posterior)
    sd, rho, _ = whitened(features, posterior, d, posterior.mean.dtype)
    s, u = posterior.covariance[:, None, :d, :d], sd * rho
    mu = (m * r)[..., :, None] * u[..., None, :]
    cov = sd.square()[..., None] * (m[..., :, None] * m[..., None, :]) + mu + mu.mT
    cov = cov + (r.square() + sd.square())[..., None] * s + u[..., :, None] * u[..., None, :]
    mean = torch.addcmul(rho * (2 * sd), m, 2 * r)
    return mean.transpose(0, 1), (4 * cov).transpose(0, 1)


def _residuals(features: Tensor, targets: Tensor, posterior: Gaussian) -> Tensor:
    """``r``, ``[K, N, 1]``; worked out once, so that means agree in every bit."""
    return torch.addmm(targets.mT, posterior.mean, features.mT, beta=-1)[..., None]

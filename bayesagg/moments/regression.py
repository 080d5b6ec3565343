"""Squared error: both moments in closed form (Eq. 4), never a d×d matrix per datum."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.moments.whitened import log_or_scale, whitened
from bayesagg.posterior import Gaussian

__all__ = ["regression_moments"]


def regression_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    full: bool = False,
    *,
    log: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Moments of ``g = 2 w (h̃ᵀw - y)`` for ``w ~ N(m, S)``.

    With ``u = S h̃``, ``v = h̃ᵀ S h̃``, ``r = h̃ᵀm - y``::

        E[g]   = 2 (u + m r)
        Var[g] = 4 (m² v + 2 m r u + S_dd (r² + v) + u²)
        Cov[g] = 4 (v m mᵀ + r (m uᵀ + u mᵀ) + (r² + v) S + u uᵀ)

    which equals Eq. 4 minus the outer product of the mean. The variance is computed as a sum of
    squares, in which nothing cancels: with ``ρ = u/√v``, ``q² = r² + v``, ``a = r/q``, ``b = √v/q``
    it is ``4 q² ((b m + a ρ)² + (S_dd - ρ²) + 2 b² ρ²)``, and ``|ρ| ≤ √S_dd``.

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: ``[N, K]``.
        posterior: of ``K`` outputs over ``D`` weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.
        log: return the logarithm of the variance, which cannot underflow.
        dtype: of the results without ``full``; that of the posterior by default.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    m = posterior.mean[:, None, :d]
    r = (features @ posterior.mean.mT - targets).mT[..., None]  # [K, N, 1]
    sd, rho, remaining = whitened(features, posterior, d, None if full else dtype)
    m_rounded = m.to(rho.dtype)
    mean = (rho * (2 * sd).to(rho.dtype)).addcmul(m_rounded, (2 * r).to(rho.dtype))
    if full:
        s, u = posterior.covariance[:, None, :d, :d], sd * rho
        mu = (m * r)[..., :, None] * u[..., None, :]
        cov = sd.square()[..., None] * (m[..., :, None] * m[..., None, :]) + mu + mu.mT
        cov = cov + (r.square() + sd.square())[..., None] * s + u[..., :, None] * u[..., None, :]
        return mean.transpose(0, 1), (4 * cov).transpose(0, 1)
    q = torch.hypot(r, sd)
    safe = q.clamp(min=torch.finfo(q.dtype).tiny)
    a, b = (r / safe).to(rho.dtype), (sd / safe).to(rho.dtype)
    variance = (rho * a).addcmul(m_rounded, b).square_()
    variance.addcmul_(rho.square(), 2 * b.square()).add_(remaining)
    variance = log_or_scale(variance, 4 * q.square(), log)
    return mean.transpose(0, 1), variance.transpose(0, 1)

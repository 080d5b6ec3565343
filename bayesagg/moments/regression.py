"""Squared error: both moments in closed form (Eq. 4), never a d×d matrix per datum."""

from __future__ import annotations

from torch import Tensor

from bayesagg.posterior import Gaussian

__all__ = ["regression_moments"]


def regression_moments(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, full: bool = False
) -> tuple[Tensor, Tensor]:
    """Moments of ``g = 2 w (h̃ᵀw - y)`` for ``w ~ N(m, S)``.

    With ``u = S h̃``, ``v = h̃ᵀ S h̃``, ``r = h̃ᵀm - y``::

        E[g]   = 2 (u + m r)
        Var[g] = 4 (m² v + 2 m r u + S_dd (r² + v) + u²)
        Cov[g] = 4 (v m mᵀ + r (m uᵀ + u mᵀ) + (r² + v) S + u uᵀ)

    which equals Eq. 4 minus the outer product of the mean. The first two terms and the part
    ``S_dd r²`` of the third are the variance of ``m (h̃ᵀδ) + r δ``: nothing cancels.

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: ``[N, K]``.
        posterior: of ``K`` outputs over ``D`` weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    white = features @ posterior.whitener.mT  # [G, N, D]
    u = (white @ posterior.whitener[..., :d]).transpose(0, 1)  # [N, G, d]
    v = white.square().sum(-1).mT[..., None]  # [N, G, 1]
    m = posterior.mean[:, :d]
    r = (features @ posterior.mean.mT - targets)[..., None]  # [N, K, 1]
    mr = m * r
    mean = (u + mr).mul_(2)
    if full:
        s = posterior.covariance[:, :d, :d]
        mu = mr[..., :, None] * u[..., None, :]
        cov = v[..., None] * (m[:, :, None] * m[:, None, :]) + mu + mu.mT
        cov = cov + (r.square() + v)[..., None] * s + u[..., :, None] * u[..., None, :]
        return mean, 4 * cov
    # u² + 2 u m r = (u + m r)² - (m r)² would cancel; keep the terms apart.
    variance = mr.mul_(2).add_(u).mul_(u)
    variance.addcmul_(m.square(), v).addcmul_(posterior.variance[:, :d], r.square() + v)
    return mean, variance.mul_(4).clamp_(min=0)

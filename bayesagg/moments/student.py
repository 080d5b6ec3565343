"""Regression with noise of unknown scale: gradient of a Student-t likelihood, leave-one-out."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.posterior import Gaussian

__all__ = ["leave_one_out", "leave_one_out_residuals", "student_gradient"]

DEGREES_OF_FREEDOM = 10.0
_MAX_LEVERAGE = 0.9  # of a datum on its own prediction; more is rounding or interpolation


def leave_one_out(
    features: Tensor, targets: Tensor, posterior: Gaussian
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prediction of every datum by the posterior without that datum.

    The model is conjugate in weights and noise, ``w | τ² ~ N(m, τ² A⁻¹)`` with the precision ``A``
    in units of 1/τ², so that all outputs share it and τ² cancels from the mean. Taking
    datum i out is a rank-one change (Sherman-Morrison): with ``u = A⁻¹ h̃``, the leverage
    ``ℓ = h̃ᵀu`` and ``r = h̃ᵀm - y``::

        κ = 1 / (1 - ℓ)     r' = κ r     m' = m + κ r u     u' = κ u     h̃ᵀA'⁻¹h̃ = κ ℓ

    Args:
        features: ``h̃``, ``[N, D]``.
        targets: ``[N, K]``.
        posterior: of ``K`` outputs with ``G`` factors of ``A``, each datum in it once.

    Returns:
        ``r'``, ``[N, K]``; ``u'``, ``[N, G, D]``; ``κ ℓ``, ``[N, G]``; and ``r``, ``[N, K]``.
        Leverages are taken as 0.9 at most.
    """
    white, leverage = _leverages(features, posterior)
    kappa = 1 / (1 - leverage)
    r = features @ posterior.mean.mT - targets
    u = (white @ posterior.whitener).transpose(0, 1)
    return kappa * r, kappa[..., None] * u, kappa * leverage, r


def leave_one_out_residuals(features: Tensor, targets: Tensor, posterior: Gaussian) -> Tensor:
    """The first result of :func:`leave_one_out`, ``r'``, ``[N, K]``, alone; same arguments."""
    _, leverage = _leverages(features, posterior)
    return (features @ posterior.mean.mT - targets) / (1 - leverage)


def _leverages(features: Tensor, posterior: Gaussian) -> tuple[Tensor, Tensor]:
    """``T h̃`` with ``A⁻¹ = TᵀT``, ``[G, N, D]``, and ``ℓ``, its squared norm, ``[N, G]``."""
    white = features @ posterior.whitener.mT
    return white, white.square().sum(-1).mT.clamp(max=_MAX_LEVERAGE)


def student_gradient(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    noise_variance: Tensor,
    degrees_of_freedom: float = DEGREES_OF_FREEDOM,
) -> tuple[Tensor, Tensor]:
    """Expected gradient of a squared error, scaled as that of a Student-t likelihood.

    With the posterior of :func:`leave_one_out` the expected gradient of ``(h̃ᵀw - y)²`` is
    ``2 (τ² u' + m' r')``. The negative log-density of a Student-t variable of scale τ and ν
    degrees of freedom has the gradient of the squared error times ``(ν + 1) / 2 (ν τ² + e²)``; for
    ``e²`` its expectation ``r'² + τ² κ ℓ`` is taken. The gradient is in nats, whatever the unit of
    the label, and the influence of a datum is bounded.

    Args:
        features: ``h̃``, ``[N, D]``.
        targets: ``[N, K]``.
        posterior: as of :func:`leave_one_out`.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        noise_variance: τ² of each output, ``[K]``.
        degrees_of_freedom: ν.

    Returns:
        the gradient, ``[N, K, d]``, and the factor between it and that of the squared error,
        ``[N, K]``.
    """
    r, u, excess, plain = leave_one_out(features, targets, posterior)
    spread = degrees_of_freedom * noise_variance + r.square() + noise_variance * excess
    factor = (degrees_of_freedom + 1) / 2 / spread
    along = 2 * factor * (r * plain + noise_variance)
    gradient = (2 * factor * r)[..., None] * posterior.mean[:, :d]
    return torch.addcmul(gradient, along[..., None], u[..., :d]), factor

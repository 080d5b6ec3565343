"""What the moments of several likelihoods share: a variance in two parts, and whitened weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayesagg.posterior import Gaussian

__all__ = ["LogMoments", "variance_of", "whitened"]


class LogMoments(NamedTuple):
    """Moments whose variance is ``relative · exp(log_scale)``, which cannot underflow.

    Attributes:
        mean: ``E[g]``, ``[N, K, d]``.
        relative: positive, of the order of the variance of the weights, ``[N, K, d]``.
        log_scale: that of the squared residual, ``[N, K, 1]``.
    """

    mean: Tensor
    relative: Tensor
    log_scale: Tensor


def variance_of(moments: LogMoments) -> tuple[Tensor, Tensor]:
    """``E[g]`` and ``Var[g]``, ``[N, K, d]``."""
    return moments.mean, moments.relative * moments.log_scale.exp()


def whitened(
    features: Tensor, posterior: Gaussian, d: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Spread of the outputs ``h̃ᵀw`` and their covariance with the weights.

    With the output's standardised value ``x`` the weights are ``m + ρ x + noise``. The spread is
    computed in the dtype of the posterior. The rest is ``ρ = Tᵀe`` with a unit vector
    ``e = T h̃ / |T h̃|`` and ``S = TᵀT``, so rounding to ``dtype`` costs ``√S_dd`` times its epsilon,
    however badly conditioned ``S`` is.

    Returns:
        standard deviation of the outputs, ``[G, N, 1]``; ``ρ = S h̃ / sd``, ``[G, N, d]``; and
        ``S_dd``, ``[G, 1, d]``, which is at least ``ρ²`` but for rounding.
    """
    unit = features @ posterior.whitener.mT  # [G, N, D]
    sd = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    unit = unit.div_(sd.clamp(min=torch.finfo(sd.dtype).tiny)).to(dtype)
    root = posterior.whitener[..., :d].to(dtype)
    rho = unit @ root
    return sd, rho, root.square().sum(-2, keepdim=True)

"""What the moments of regression and binary heads share: the weights given the output."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.posterior import Gaussian

__all__ = ["log_or_scale", "whitened"]


def whitened(
    features: Tensor, posterior: Gaussian, d: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Spread of the outputs ``h̃ᵀw`` and their covariance with the weights.

    With the output's standardised value ``x`` the weights are ``m + ρ x + noise``. The spread is
    computed in the dtype of the posterior. The rest is ``ρ = Tᵀe`` with a unit vector
    ``e = T h̃ / |T h̃|`` and ``S = TᵀT``, so rounding to ``dtype`` costs ``√S_dd`` times its epsilon,
    however badly conditioned ``S`` is.

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        posterior: of ``K`` outputs; ``G`` covariances, ``K`` or 1.
        d: number of shared dimensions.
        dtype: of the second and third result.

    Returns:
        standard deviation of the outputs, ``[G, N, 1]``; ``ρ = S h̃ / sd``, ``[G, N, d]``; and
        ``S_dd - ρ²``, at least 0, ``[G, N, d]``.
    """
    unit = features @ posterior.whitener.mT  # [G, N, D]
    sd = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    unit = unit.div_(sd.clamp(min=torch.finfo(sd.dtype).tiny)).to(dtype)
    root = posterior.whitener[..., :d].to(dtype)
    rho = unit @ root
    variance = root.square().sum(-2, keepdim=True)
    return sd, rho, (variance - rho.square()).clamp_(min=0)


def log_or_scale(relative: Tensor, scale: Tensor, log: bool) -> Tensor:
    """``relative · scale``, or its logarithm without forming the product; in place.

    Args:
        relative: variance relative to ``scale``, of the order of that of the weights.
        scale: of more digits or range, and small; broadcasts.
        log: which of the two.
    """
    if not log:
        return relative.mul_(scale.to(relative.dtype))
    tiny = torch.finfo(relative.dtype).tiny  # only exact zeros are lifted
    offset = scale.clamp(min=torch.finfo(scale.dtype).tiny).log().to(relative.dtype)
    return relative.clamp_(min=tiny).log_().add_(offset)

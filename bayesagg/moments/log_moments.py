"""What all moments without covariances return: a variance in two parts, as Eq. 7 takes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LogMoments", "variance_of"]


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

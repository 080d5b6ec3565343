"""Every likelihood as least squares on working responses: what evidence that streams is made of.

A quadratic with a curvature ``c`` that does not depend on the datum bounds each negative
log-likelihood from above and touches it at the current output ``z`` (majorise-minimise): up to a
constant it is ``c/2 (h̃ᵀw - t)²`` with the working response ``t = z - e/c``, ``e`` the derivative
at ``z``, the loss's own over its factor. So one Gram matrix ``H̃ᵀH̃`` serves every task on the same
features, and the minimum of the bound cannot overshoot (Böhning 1992). For a squared error the
bound is exact and ``t = y``. Of many classes it is so loose that heads would lag behind: there
``c`` is smaller, and no bound (docs/theory.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.reading import Labels

__all__ = ["BOUNDS", "Bound", "floored"]

_MANY, _OF_MANY = 16, 0.1  # classes that the bound serves, and the curvature of more


def floored(squares: Tensor, level: Tensor) -> Tensor:
    """Squared residuals, kept above the rounding of the labels, whose squares are ``level``."""
    return torch.maximum(squares, level * 1e-10)


class Bound(ABC):
    """A likelihood bounded by a quadratic.

    Attributes:
        curvature: ``c``.
        exact: the likelihood is the quadratic (Gaussian), so that a datum can be taken out of the
            posterior and the noise has a scale τ² to learn.
        least_scale: bounds the weight of a task that is fitted perfectly, in units of the misfit.
    """

    curvature: float
    exact: bool = False
    least_scale: float = 1e-2  # nats

    def curvature_of(self, outputs: int) -> float:
        """``c`` of a head of so many outputs (classes)."""
        return self.curvature

    def prior_factor(self, outputs: int) -> float:
        """What the prior variance of a head of so many outputs (classes) is multiplied by."""
        return 1.0

    def working(self, labels: Labels, gradient: Tensor) -> Tensor:
        """Working responses of every output (class), ``[N, P]``.

        ``gradient``: of the loss at the outputs, in the shape of the labels' outputs.
        """
        factor, value = labels.factor, -1 / self.curvature_of(labels.outputs.shape[-1])
        if labels.outputs.dim() == 2:
            return torch.addcdiv(labels.outputs, gradient, factor, value=value)
        return torch.addcdiv(labels.outputs, gradient, factor[..., None], value=value).flatten(1)

    @abstractmethod
    def misfit(self, labels: Labels) -> Tensor:
        """What the scale of the likelihood is the mean of, at the outputs, ``[N, K]``."""


class _SquaredError(Bound):
    curvature, exact, least_scale = 1.0, True, 0.0

    def working(self, labels: Labels, gradient: Tensor) -> Tensor:
        return labels.targets

    def misfit(self, labels: Labels) -> Tensor:
        return floored((labels.outputs - labels.targets).square(), labels.targets.square())


class _Logistic(Bound):
    curvature = 0.25  # σ(1-σ) ≤ 1/4

    def misfit(self, labels: Labels) -> Tensor:
        if labels.nll is not None:
            return labels.nll
        return F.binary_cross_entropy_with_logits(labels.outputs, labels.targets, reduction="none")


class _Softmax(Bound):
    curvature = 0.5  # diag p - p pᵀ ≤ 1/2

    def curvature_of(self, outputs: int) -> float:
        return self.curvature if outputs <= _MANY else _OF_MANY

    def prior_factor(self, outputs: int) -> float:
        return max(1.0, outputs / _MANY)  # so many times fewer data are of each

    def misfit(self, labels: Labels) -> Tensor:
        if labels.nll is not None:
            return labels.nll
        return -(labels.targets * labels.outputs.log_softmax(2)).sum(2)


BOUNDS: dict[str, Bound] = {
    "regression": _SquaredError(),
    "binary": _Logistic(),
    "multiclass": _Softmax(),
}
"""By kind of head."""

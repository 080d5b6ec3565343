"""The library's default without one of its ingredients, for ablations.

Each takes one part of ``rule="likelihood"`` away by replacing what its blocks compute; they are no
settings of the library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.likelihoods.binary import BinaryBlock
from bayesagg.likelihoods.classification import ClassificationBlock
from bayesagg.likelihoods.data import Labels, Statistics
from bayesagg.likelihoods.multiclass import MulticlassBlock
from bayesagg.likelihoods.regression import RegressionBlock
from bayesagg.moments import student_gradient
from bayesagg.moments.student import DEGREES_OF_FREEDOM
from bayesagg.posterior import Gaussian
from examples.methods import BayesAggregation
from examples.training import TrainSettings

_GAUSSIAN = 1e12  # degrees of freedom at which a Student-t is normal to rounding


class GaussianRegression(RegressionBlock):
    """A normal likelihood in place of the Student-t: no bound on the influence of a datum."""

    def likelihood_gradient(
        self, features: Tensor, labels: Labels, posterior: Gaussian | None
    ) -> tuple[Tensor, Tensor | None]:
        """As in the library, with very many degrees of freedom."""
        assert posterior is not None
        y = labels.targets
        return student_gradient(features, y, posterior, self.d, self._tau2, _GAUSSIAN)


class InSampleRegression(RegressionBlock):
    """Predictions of the posterior that has seen the datum."""

    def likelihood_gradient(
        self, features: Tensor, labels: Labels, posterior: Gaussian | None
    ) -> tuple[Tensor, Tensor | None]:
        """Student-t gradient of the expected squared error, without leaving anything out."""
        assert posterior is not None
        white = features @ posterior.whitener.mT
        excess = white.square().sum(-1).mT
        u = (white @ posterior.whitener).transpose(0, 1)[..., : self.d]
        r = features @ posterior.mean.mT - labels.targets
        return self._student(r, excess, posterior.mean, u)

    def _student(
        self, r: Tensor, excess: Tensor | float, mean: Tensor, u: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        nu, tau2 = DEGREES_OF_FREEDOM, self._tau2
        factor = (nu + 1) / 2 / (nu * tau2 + r.square() + tau2 * excess)
        gradient = (2 * factor * r)[..., None] * mean[:, : self.d]
        if u is not None:
            gradient = gradient + (2 * factor * tau2)[..., None] * u
        return gradient, factor


class PointRegression(InSampleRegression):
    """Predictions of the current head weights in place of the posterior's."""

    def likelihood_gradient(
        self, features: Tensor, labels: Labels, posterior: Gaussian | None
    ) -> tuple[Tensor, Tensor | None]:
        """Student-t gradient at the head weights."""
        r = labels.outputs - labels.targets
        return self._student(r, 0.0, self.weights(features.device), None)


class UnscaledRegression(RegressionBlock):
    """A noise variance of one that is not learned."""

    def noise_variance(self, device: torch.device, batch: Statistics | None = None) -> Tensor:
        """Ones."""
        return torch.ones(self.num_tasks, dtype=self.dtype, device=device)


class _Unscaled(ClassificationBlock):
    def step_posterior(self, batch: Statistics) -> Gaussian | None:
        """Without a dispersion."""
        return None


class UnscaledBinary(_Unscaled, BinaryBlock):
    """A dispersion of one that is not learned."""


class UnscaledMulticlass(_Unscaled, MulticlassBlock):
    """A dispersion of one that is not learned."""


PARTS: dict[str, dict[str, type[Any]]] = {
    "student-t": {"regression": GaussianRegression},
    "leave-one-out": {"regression": InSampleRegression},
    "posterior-mean": {"regression": PointRegression},
    "noise": {"regression": UnscaledRegression},
    "dispersion": {"binary": UnscaledBinary, "multiclass": UnscaledMulticlass},
}


class Ablation(BayesAggregation):
    """The library's default without one part.

    Args:
        model: As of :class:`examples.methods.BayesAggregation`.
        settings: As there.
        steps_per_epoch: As there.
        without: Key of :data:`PARTS`.
        wrapper: As there.
        heads: As there.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        steps_per_epoch: int,
        without: str,
        wrapper: Mapping[str, Any],
        heads: Mapping[str, Mapping[str, Any]],
    ) -> None:
        super().__init__(model, settings, steps_per_epoch, wrapper, heads)
        for block in self.optimizer.engine._blocks:
            block.__class__ = PARTS[without].get(block.kind, type(block))

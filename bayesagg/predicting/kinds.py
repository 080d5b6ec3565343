"""Predictions of each kind of head: regressions in closed form, classifications by integration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, StudentT

from bayesagg.predicting.prediction import Prediction, Reading, by_rows
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments
from bayesagg.predicting.student import NORMAL, interpolated, student_quantile

__all__ = ["KINDS", "BinaryPrediction", "MulticlassPrediction", "RegressionPrediction"]


class _Values(Reading):
    @cached_property
    def factor(self) -> Tensor:
        return self.of_all("scale").square() / (1 - 2 / self.of_all("dof"))

    @property
    def output(self) -> Tensor:
        return self.location

    mean = output

    @cached_property
    def output_variance(self) -> Tensor:
        return self.variance * self.of_all("scale").square()

    @cached_property
    def epistemic(self) -> Tensor:
        return self.variance * self.factor

    @cached_property
    def aleatoric(self) -> Tensor:
        return (self.of_all("noise") * self.factor).expand_as(self.variance)

    @cached_property
    def stddev(self) -> Tensor:
        return ((self.variance + self.of_all("noise")) * self.factor).sqrt()

    @cached_property
    def spread(self) -> Tensor:
        return (self.variance + self.of_all("noise")).sqrt() * self.of_all("scale")


class RegressionPrediction(Prediction):
    """Student-t (normal where the noise is given) with location ``h̃ᵀm``, squared scale τ² + h̃ᵀSh̃.

    Calibration multiplies the scale, and lets intervals reach as far as its residuals do (split
    conformal prediction). The variances are those of the distribution: the squared scale times
    ``ν / (ν - 2)``, split in proportion. Units are those of the labels.
    """

    reading = _Values

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom ν of every output, so that they broadcast; infinite: normal."""
        first = self.posterior.head.channels_first
        return self._own("dof").view(-1, *(1 for _ in self._reading.shape[1:] if first))

    @property
    def scale(self) -> Tensor:
        """Scale of the predictive distribution, ``√(τ² + h̃ᵀSh̃)`` times the calibration."""
        return self._back(self._rows("spread"))

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        if bool((self.dof >= NORMAL).all()):
            return Normal(self.mean, self.scale, validate_args=False)
        return StudentT(self.dof.expand_as(self.mean), self.mean, self.scale, validate_args=False)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        dof, halves = self._own("dof"), self._own("halves")
        if halves.numel():
            half = interpolated(halves, level, dof) * self._rows("spread")
        else:
            half = student_quantile((1 + level) / 2, dof) * self._rows("spread")
        return self._rows("mean") - half, self._rows("mean") + half

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        # √(ν / χ²_ν) makes a Student-t of a normal.
        dof = self._own("dof").clamp_max(NORMAL).expand(number, -1)
        gamma = torch._standard_gamma(dof / 2, generator=generator)
        mixture = torch.where(dof < NORMAL, (dof / 2 / gamma).sqrt(), 1.0)
        drawn = self.posterior.deviations(number, self.rows, generator)
        if noise:
            error = torch.empty_like(drawn).normal_(generator=generator)
            drawn = drawn + error * self._own("noise").sqrt()
        return self._back(self._rows("mean") + drawn * (self._own("scale") * mixture)[:, None], 1)


class _Logits(Reading):
    """Over the temperature; the variance ``p (1 - p)`` of labels is split in two."""

    @cached_property
    def factor(self) -> Tensor:
        return 1 / self.of_all("scale").square()

    @cached_property
    def output(self) -> Tensor:
        return self.location / self.of_all("scale")

    @cached_property
    def output_variance(self) -> Tensor:
        return self.variance * self.factor

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``E[p]``, ``E[1 - p]`` and ``Var[p]``."""
        each = 64 * self.output.shape[1]
        p, q, variance = by_rows(sigmoid_moments, each, self.output, self.output_variance.sqrt())
        return p, q, variance

    @property
    def total(self) -> Tensor:
        return self.moments[0] * self.moments[1]

    @property
    def mean(self) -> Tensor:
        return self.moments[0]

    @property
    def epistemic(self) -> Tensor:
        return self.moments[2]

    @cached_property
    def aleatoric(self) -> Tensor:
        return (self.total - self.moments[2]).clamp_min(0)

    @cached_property
    def stddev(self) -> Tensor:
        return self.total.clamp_min(0).sqrt()

    @cached_property
    def logits(self) -> Tensor:
        return self.moments[0].log() - self.moments[1].log()  # either may be nothing


class BinaryPrediction(Prediction):
    """Probability ``E[σ(z)]`` of every output, ``z ~ N(h̃ᵀm, h̃ᵀSh̃)`` over the temperature.

    By quadrature. The variance ``p (1 - p)`` of a label is split into ``Var[σ(z)]``, epistemic, and
    ``E[σ(z) (1 - σ(z))]``.
    """

    reading = _Logits

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        return Bernoulli(logits=self._back(self._rows("logits")), validate_args=False)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        upper = torch.tensor((1 + level) / 2, dtype=torch.float64)
        half = torch.special.ndtri(upper) * self._rows("output_variance").sqrt()
        return (self._rows("output") - half).sigmoid(), (self._rows("output") + half).sigmoid()

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        p = _drawn(self, number, generator).sigmoid()
        return self._back(torch.bernoulli(p, generator=generator) if noise else p, 1)


class _Classes(_Logits):
    """Of one head, whose logits depend on each other."""

    @cached_property
    def integrals(self) -> tuple[Tensor, ...]:
        """``log E[p]`` and ``Var[p]``."""

        def integrals(logs: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            mean = (logs + weights.log()).logsumexp(2)
            return mean, ((logs.exp() - mean.exp()[..., None]).square() * weights).sum(2)

        return self.integrated(integrals)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.logits.exp()
        return mean, 1 - mean, self.integrals[1]

    @property
    def logits(self) -> Tensor:
        return self.integrals[0]

    def integrated(
        self, function: Callable[..., tuple[Tensor, ...]], even: bool = False
    ) -> tuple[Tensor, ...]:
        """A function of what :func:`class_probabilities` gives."""
        [posterior], scale = self.posteriors, self.of_all("scale")
        each = max(512 * posterior.head.out_features, posterior.per_row())

        def of_rows(h: Tensor, output: Tensor) -> tuple[Tensor, ...]:
            return function(*class_probabilities(output, posterior.factor(h) / scale, even))

        return by_rows(of_rows, each, self.h, self.output)


class MulticlassPrediction(Prediction):
    """Probabilities ``E[softmax(z)]``, ``z`` jointly normal over the temperature; by cubature."""

    reading = _Classes
    _reading: _Classes

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        logits = self._rows("logits").view(*self._reading.shape, -1)
        return Categorical(logits=logits, validate_args=False)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        def quantiles(logs: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            if not len(logs):  # torch has no quantiles of no data
                return logs[..., 0], logs[..., 0]
            ends = logs.new_tensor([(1 - level) / 2, (1 + level) / 2])
            return torch.quantile(logs.exp(), ends, -1).unbind()

        low, high = self._reading.integrated(quantiles, even=True)
        return low, high

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        p = _drawn(self, number, generator).softmax(-1)
        if not noise:
            return self._back(p, 1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
        return drawn.view(number, *self._reading.shape)


def _drawn(prediction: Prediction, number: int, generator: torch.Generator | None) -> Tensor:
    """Logits."""
    deviations = prediction.posterior.deviations(number, prediction.rows, generator)
    return prediction._rows("output") + deviations / prediction._own("scale")


KINDS: dict[str, type[Prediction]] = {
    "regression": RegressionPrediction,
    "binary": BinaryPrediction,
    "multiclass": MulticlassPrediction,
}

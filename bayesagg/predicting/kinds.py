"""Predictions of each kind of head: regressions in closed form, classifications by integration."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, StudentT

from bayesagg.predicting.prediction import Prediction, by_rows
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments
from bayesagg.predicting.student import NORMAL, interpolated, student_quantile

__all__ = ["KINDS", "BinaryPrediction", "MulticlassPrediction", "RegressionPrediction"]


class RegressionPrediction(Prediction):
    """Student-t (normal where the noise is given) with location ``h̃ᵀm``, squared scale τ² + h̃ᵀSh̃.

    Calibration multiplies the scale, and intervals reach as far as its residuals say
    (:func:`bayesagg.predicting.student.half_widths`). The variances are those of the distribution:
    the squared scale times ``ν / (ν - 2)``, split in proportion. Units are those of the labels.
    """

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom ν of every output, so that they broadcast; infinite: normal."""
        first = self.posterior.head.channels_first
        return self._dof.view(-1, *(1 for _ in self._reading.shape[1:] if first))

    @property
    def scale(self) -> Tensor:
        """Scale of the predictive distribution, ``√(τ² + h̃ᵀSh̃)`` times the calibration."""
        return self._back(self._spread)

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        if bool((self._dof >= NORMAL).all()):
            return Normal(self.mean, self.scale, validate_args=False)
        return StudentT(self.dof.expand_as(self.mean), self.mean, self.scale, validate_args=False)

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        # √(ν / χ²_ν) makes a Student-t of a normal.
        dof = self._dof.clamp_max(NORMAL).expand(number, -1)
        gamma = torch._standard_gamma(dof / 2, generator=generator)
        mixture = torch.where(self._dof < NORMAL, (dof / 2 / gamma).sqrt(), 1.0)
        drawn = self.posterior.deviations(number, self.rows, generator)
        if noise:
            error = torch.empty_like(drawn).normal_(generator=generator)
            drawn = drawn + error * self._own("noise").sqrt()
        return self._back(self._location + drawn * (self._own("scale") * mixture)[:, None], 1)

    @property
    def _location(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("location", self._place)

    _mean = _location

    @property
    def _variance(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("variance", self._place) * self._own("scale").square()

    @property
    def _epistemic(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("variance", self._place) * self._factor

    @property
    def _aleatoric(self) -> Tensor:  # type: ignore[override]
        return (self._own("noise") * self._factor).expand_as(self._location)

    @property
    def _stddev(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("stddev", self._place)

    @property
    def _dof(self) -> Tensor:
        return self._own("dof")

    @property
    def _factor(self) -> Tensor:  # type: ignore[override]
        return self._own("scale").square() / (1 - 2 / self._dof)

    @property
    def _spread(self) -> Tensor:
        square = self._reading.part("variance", self._place) + self._own("noise")
        return square.sqrt() * self._own("scale")

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        if self.posterior.halves.numel():
            half = interpolated(self._own("halves"), level, self._dof)
        else:
            half = student_quantile((1 + level) / 2, self._dof)
        return self._location - half * self._spread, self._location + half * self._spread


class _Labels(Prediction):
    """Logits over the temperature, and a variance ``p (1 - p)`` of labels that is split in two."""

    @cached_property
    def _location(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("location", self._place) / self._own("scale")

    @cached_property
    def _variance(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("variance", self._place) * self._factor

    @property
    def _factor(self) -> Tensor:  # type: ignore[override]
        return 1 / self._own("scale").square()

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """``E[p]``, the variance of labels, and that of ``p``."""
        raise NotImplementedError

    @property
    def _mean(self) -> Tensor:  # type: ignore[override]
        return self._moments[0]

    @property
    def _epistemic(self) -> Tensor:  # type: ignore[override]
        return self._moments[2]

    @property
    def _aleatoric(self) -> Tensor:  # type: ignore[override]
        return (self._moments[1] - self._moments[2]).clamp_min(0)

    @property
    def _stddev(self) -> Tensor:  # type: ignore[override]
        return self._moments[1].clamp_min(0).sqrt()

    def _drawn(self, number: int, generator: torch.Generator | None) -> Tensor:
        deviations = self.posterior.deviations(number, self.rows, generator)
        return self._location + deviations / self._own("scale")


class BinaryPrediction(_Labels):
    """Probability ``E[σ(z)]`` of every output, ``z ~ N(h̃ᵀm, h̃ᵀSh̃)`` over the temperature.

    By quadrature. The variance ``p (1 - p)`` of a label is split into ``Var[σ(z)]``, epistemic, and
    ``E[σ(z) (1 - σ(z))]``.
    """

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        each = 64 * self.posterior.head.out_features
        p, q, variance = by_rows(sigmoid_moments, each, self._location, self._variance.sqrt())
        return p, p * q, variance

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        logits = 2 * self._moments[0].log() - self._moments[1].log()  # p (1 - p) has the digits
        return Bernoulli(logits=self._back(logits), validate_args=False)

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        p = self._drawn(number, generator).sigmoid()
        return self._back(torch.bernoulli(p, generator=generator) if noise else p, 1)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        upper = torch.tensor((1 + level) / 2, dtype=torch.float64)
        half = torch.special.ndtri(upper) * self._variance.sqrt()
        return (self._location - half).sigmoid(), (self._location + half).sigmoid()


class MulticlassPrediction(_Labels):
    """Probabilities ``E[softmax(z)]``, ``z`` jointly normal over the temperature; by cubature."""

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor]:
        mean = self._integrals[0].exp()
        return mean, mean * (1 - mean), self._integrals[1]

    @cached_property
    def _integrals(self) -> tuple[Tensor, ...]:
        """``log E[p]`` and ``Var[p]``, ``[N, C]``."""

        def integrals(logs: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            mean = (logs + weights.log()).logsumexp(2)
            return mean, ((logs.exp() - mean.exp()[..., None]).square() * weights).sum(2)

        return self._integrated(integrals)

    def _integrated(
        self, function: Callable[..., tuple[Tensor, ...]], even: bool = False
    ) -> tuple[Tensor, ...]:
        """A function of what :func:`class_probabilities` gives."""
        scale, posterior = self._own("scale"), self.posterior
        each = max(512 * posterior.head.out_features, posterior.per_row())

        def of_rows(h: Tensor, location: Tensor) -> tuple[Tensor, ...]:
            return function(*class_probabilities(location, posterior.factor(h) / scale, even))

        return by_rows(of_rows, each, self.rows, self._location)

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        logits = self._integrals[0].view(*self._reading.shape, -1)
        return Categorical(logits=logits, validate_args=False)

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        p = self._drawn(number, generator).softmax(-1)
        if not noise:
            return self._back(p, 1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
        return drawn.view(number, *self._reading.shape)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        def quantiles(logs: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            ends = logs.new_tensor([(1 - level) / 2, (1 + level) / 2])
            return torch.quantile(logs.exp(), ends, -1).unbind()

        low, high = self._integrated(quantiles, even=True)
        return low, high


KINDS: dict[str, type[Prediction]] = {
    "regression": RegressionPrediction,
    "binary": BinaryPrediction,
    "multiclass": MulticlassPrediction,
}

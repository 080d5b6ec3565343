"""Predictions of classifications: probabilities under normally distributed logits."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayesagg.predicting.prediction import Prediction
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments
from bayesagg.predicting.student import normal_quantile

__all__ = ["BinaryPrediction", "MulticlassPrediction"]


class _Labels(Prediction):
    """Logits over the temperature, and a variance ``p (1 - p)`` of labels that is split in two."""

    @cached_property
    def _location(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("location", self._place) / self._scale

    @cached_property
    def _variance(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("variance", self._place) * self._factor

    @property
    def _factor(self) -> Tensor:  # type: ignore[override]
        return 1 / self._scale.square()

    @property
    def _total(self) -> Tensor:
        raise NotImplementedError

    @property
    def _aleatoric(self) -> Tensor:  # type: ignore[override]
        return (self._total - self._epistemic).clamp_min(0)

    @property
    def _stddev(self) -> Tensor:  # type: ignore[override]
        return self._total.clamp_min(0).sqrt()

    def _drawn(self, number: int, generator: torch.Generator | None) -> Tensor:
        return self.posterior.draw(number, self.rows, generator) / self._scale


class BinaryPrediction(_Labels):
    """Probability ``E[σ(z)]`` of every output, ``z ~ N(h̃ᵀm, h̃ᵀSh̃)`` over the temperature.

    By quadrature. The variance ``p (1 - p)`` of a label is split into ``Var[σ(z)]``, epistemic, and
    ``E[σ(z) (1 - σ(z))]``.
    """

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        return self._reading.by_rows(
            lambda _, mean, variance: sigmoid_moments(mean, variance.sqrt()),
            64 * self.posterior.layout.outputs,
            self._location,
            self._variance,
        )

    @property
    def _mean(self) -> Tensor:  # type: ignore[override]
        return self._moments[0]

    @property
    def _epistemic(self) -> Tensor:  # type: ignore[override]
        return self._moments[2]

    @property
    def _total(self) -> Tensor:
        return self._moments[0] * self._moments[1]

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        logits = self._back(self._moments[0].log() - self._moments[1].log())
        return Bernoulli(logits=logits, validate_args=False)

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        p = self._drawn(number, generator).sigmoid()
        return self._back(torch.bernoulli(p, generator=generator) if noise else p, 1)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        half = normal_quantile((1 + level) / 2) * self._variance.sqrt()
        return (self._location - half).sigmoid(), (self._location + half).sigmoid()


class MulticlassPrediction(_Labels):
    """Probabilities ``E[softmax(z)]``, ``z`` jointly normal over the temperature; by cubature."""

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        """``log E[p]`` and ``Var[p]``, ``[N, C]``."""

        def moments(h: Tensor, location: Tensor) -> tuple[Tensor, ...]:
            logs, weights = self._nodes(h, location)
            mean = (logs + weights.log()).logsumexp(2)
            return mean, ((logs.exp() - mean.exp()[..., None]).square() * weights).sum(2)

        return self._reading.by_rows(moments, self._each, self._location)

    @property
    def _each(self) -> int:
        return max(512 * self.posterior.layout.outputs, self.posterior.per_row())

    def _nodes(self, h: Tensor, location: Tensor, even: bool = False) -> tuple[Tensor, Tensor]:
        return class_probabilities(location, self.posterior.factor(h) / self._scale, even)

    @property
    def _mean(self) -> Tensor:  # type: ignore[override]
        return self._moments[0].exp()

    @property
    def _epistemic(self) -> Tensor:  # type: ignore[override]
        return self._moments[1]

    @property
    def _total(self) -> Tensor:
        return self._mean * (1 - self._mean)

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        logits = self._moments[0].view(*self._reading.shape, -1)
        return Categorical(logits=logits, validate_args=False)

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        p = self._drawn(number, generator).softmax(-1)
        if not noise:
            return self._back(p, 1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
        return drawn.view(number, *self._reading.shape)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        low, high = self._reading.by_rows(
            lambda h, location: _quantiles(*self._nodes(h, location, even=True), level),
            self._each,
            self._location,
        )
        return low, high


def _quantiles(logs: Tensor, weights: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Of the weighted nodes of every class, ``[N, C, J]``."""
    values, order = logs.exp().sort(-1)
    below = weights[order].cumsum(-1)
    ends = []
    for probability in ((1 - level) / 2, (1 + level) / 2):
        place = (below < probability).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
        ends.append(values.gather(-1, place)[..., 0])
    return ends[0], ends[1]

"""Predictions of classifications: probabilities under normally distributed logits."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from bayesagg.predicting.prediction import Prediction
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments
from bayesagg.predicting.student import student_quantile

__all__ = ["BinaryPrediction", "MulticlassPrediction"]


class BinaryPrediction(Prediction):
    """Probability ``E[σ(z)]`` of every output, ``z ~ N(h̃ᵀm, h̃ᵀSh̃)`` over the temperature.

    By quadrature. The variance ``p (1 - p)`` of a label is split into ``Var[σ(z)]``, epistemic, and
    the rest.
    """

    @cached_property
    def _location(self) -> Tensor:
        return self.posterior.location(self._h) / self._scale

    @cached_property
    def _variance(self) -> Tensor:
        rows: Tensor = self._by_rows(self.posterior.variance, self.posterior.per_row())[0]
        return rows / self._scale.square()

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        found = self._by_rows(
            lambda _, mean, variance: sigmoid_moments(mean, variance.sqrt()),
            64 * self.posterior.layout.outputs,
            self._location,
            self._variance,
        )
        return tuple(self._back(part) for part in found)

    @property
    def mean(self) -> Tensor:
        """Probability of a positive label."""
        return self._moments[0]

    @property
    def epistemic(self) -> Tensor:
        """``Var[σ(z)]``."""
        return self._moments[2]

    @property
    def aleatoric(self) -> Tensor:
        """``E[σ(z) (1 - σ(z))]``."""
        return (self._moments[0] * self._moments[1] - self._moments[2]).clamp_min(0)

    @property
    def stddev(self) -> Tensor:
        """``√(p (1 - p))``."""
        return (self._moments[0] * self._moments[1]).sqrt()

    @property
    def distribution(self) -> Distribution:
        """``Bernoulli``."""
        return Bernoulli(
            logits=self._moments[0].log() - self._moments[1].log(), validate_args=False
        )

    def covariance(self) -> Tensor:
        """Covariance of every logit between the data of the batch, ``[o, N, N]``."""
        return self.posterior.covariance(self._h) / self._scale.square()[:, None, None]

    def sample(
        self,
        number: int = 1,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As of :class:`Prediction`: probabilities, or labels 0 and 1."""
        p = (self.posterior.draw(number, self._h, generator) / self._scale).sigmoid()
        return self._back(torch.bernoulli(p, generator=generator) if noise else p, 1)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        normal = torch.full_like(self._scale[:1], torch.inf)
        half = student_quantile((1 + level) / 2, normal) * self._variance.sqrt()
        low, high = (self._location - half).sigmoid(), (self._location + half).sigmoid()
        return self._back(low), self._back(high)


class MulticlassPrediction(Prediction):
    """Probabilities ``E[softmax(z)]``, ``z`` jointly normal over the temperature; by cubature."""

    @cached_property
    def _location(self) -> Tensor:
        return self.posterior.location(self._h) / self._scale

    @cached_property
    def _variance(self) -> Tensor:
        rows: Tensor = self._by_rows(self.posterior.variance, self.posterior.per_row())[0]
        return rows / self._scale.square()

    @cached_property
    def _moments(self) -> tuple[Tensor, ...]:
        found = self._by_rows(self._at, self._each, self._location)
        return tuple(self._back(part) for part in found)

    @property
    def _each(self) -> int:
        return max(512 * self.posterior.layout.outputs, self.posterior.per_row())

    def _nodes(self, h: Tensor, location: Tensor, even: bool = False) -> tuple[Tensor, Tensor]:
        return class_probabilities(location, self.posterior.factor(h) / self._scale, even)

    def _at(self, h: Tensor, location: Tensor) -> tuple[Tensor, ...]:
        """``log E[p]`` and ``Var[p]``, ``[N, C]``."""
        logs, weights = self._nodes(h, location)
        mean = (logs + weights.log()).logsumexp(2)
        return mean, ((logs.exp() - mean.exp()[..., None]).square() * weights).sum(2)

    @property
    def mean(self) -> Tensor:
        """Probabilities of the classes."""
        return self._moments[0].exp()

    @property
    def epistemic(self) -> Tensor:
        """Variance of every probability."""
        return self._moments[1]

    @property
    def aleatoric(self) -> Tensor:
        """``E[p (1 - p)]`` of every class."""
        return (self.mean * (1 - self.mean) - self._moments[1]).clamp_min(0)

    @property
    def stddev(self) -> Tensor:
        """``√(p (1 - p))`` of every class."""
        return (self.mean * (1 - self.mean)).clamp_min(0).sqrt()

    @property
    def distribution(self) -> Distribution:
        """``Categorical`` over the classes, for every datum (position)."""
        logits = self._moments[0]
        if self.posterior.layout.channels_first:
            logits = logits.movedim(1, -1)
        return Categorical(logits=logits, validate_args=False)

    def sample(
        self,
        number: int = 1,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As of :class:`Prediction`: probabilities, or class indices."""
        z = self.posterior.draw(number, self._h, generator) / self._scale
        p = z.softmax(-1)
        if not noise:
            return self._back(p, 1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
        return drawn.view(number, *self._shape)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        ends = self._by_rows(
            lambda h, location: _quantiles(*self._nodes(h, location, even=True), level),
            self._each,
            self._location,
        )
        return self._back(ends[0]), self._back(ends[1])


def _quantiles(logs: Tensor, weights: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Of the weighted nodes of every class, ``[N, C, J]``."""
    values, order = logs.exp().sort(-1)
    below = weights[order].cumsum(-1)
    ends = []
    for probability in ((1 - level) / 2, (1 + level) / 2):
        place = (below < probability).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
        ends.append(values.gather(-1, place)[..., 0])
    return ends[0], ends[1]

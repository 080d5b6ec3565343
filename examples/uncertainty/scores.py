"""Predictive distributions of all tasks in one form, their scores, and one calibration for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.diagnostics import brier_score, expected_calibration_error
from bayesagg.predicting.student import student_density, student_quantile
from examples.comparison.tasks import Task

LEVELS = (0.5, 0.8, 0.9, 0.95)
_TEMPERATURES = torch.logspace(-1, 1, 201, dtype=torch.float64)


@dataclass(frozen=True)
class Belief:
    """What is believed of the labels of one task."""

    mean: Tensor  # of a regression ``[n]``; of a classification log-probabilities ``[n, C]``
    scale: Tensor | None = None  # of a regression, ``[n]``
    dof: float = float("inf")  # of its Student-t distribution; infinite: normal
    # Half-widths of its intervals of :data:`LEVELS`, ``[n, L]``; ``None``: of the distribution
    halves: Tensor | None = None

    def losses(self, y: Tensor) -> Tensor:
        """Negative log-likelihood of every label, in nats."""
        if self.scale is None:
            return -self.mean.gather(1, y.long()[:, None])[:, 0]
        nu = torch.full_like(self.mean, self.dof)
        density = student_density((y - self.mean) / self.scale, nu) / self.scale
        return -density.clamp_min(1e-300).log()

    def times(self, factor: Tensor) -> Belief:
        """Scale times a factor, or log-probabilities over it."""
        if self.scale is None:
            return replace(self, mean=(self.mean / factor).log_softmax(1))
        return replace(self, scale=self.scale * factor)

    def calibrated(self, own: Belief, y: Tensor) -> Belief:
        """With the factor by which ``own``, of the validation part, has the likeliest labels."""
        if own.scale is not None and own.dof == float("inf"):
            return self.times(((y - own.mean) / own.scale).square().mean().sqrt())
        found = torch.stack([own.times(t).losses(y).mean() for t in _TEMPERATURES])
        return self.times(_TEMPERATURES[found.argmin()])


Beliefs = list[Belief]


def classified(z: Tensor) -> Belief:
    """Of a classification, from its logits: ``[n]`` of a binary task, ``[n, C]`` of classes."""
    z = z.double()
    return Belief(
        z.log_softmax(1) if z.dim() == 2 else torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], 1)
    )


def mixture(members: Sequence[Beliefs]) -> Beliefs:
    """Of an ensemble: mean probabilities; mean and variance of a mixture, as a normal."""
    found = []
    for beliefs in zip(*members, strict=True):
        mean = torch.stack([b.mean for b in beliefs])
        scales = [b.scale for b in beliefs if b.scale is not None]
        if not scales:
            found.append(Belief(mean.logsumexp(0) - torch.tensor(len(mean)).log()))
            continue
        variance = torch.stack(scales).square().mean(0) + mean.var(0, correction=0)
        found.append(Belief(mean.mean(0), variance.sqrt()))
    return found


def scores(tasks: Sequence[Task], beliefs: Beliefs, y: Tensor) -> dict[str, float]:
    """Means over tasks: ``nll``, and of classifications ``ece`` and ``brier``.

    Labels of regressions are standardised; the Brier score of a binary task is that of one class.
    """
    lists: dict[str, list[float]] = {}
    for k, (task, belief) in enumerate(zip(tasks, beliefs, strict=True)):
        nll = belief.losses(y[:, k]).mean().item()
        lists.setdefault("nll", []).append(nll)
        if belief.scale is None:
            p, labels = belief.mean.exp(), y[:, k].long()
            lists.setdefault("ece", []).append(expected_calibration_error(p, labels))
            half = 2 if task.kind == "binary" else 1
            lists.setdefault("brier", []).append(brier_score(p, labels) / half)
    return {name: sum(values) / len(values) for name, values in lists.items()}


def coverage(beliefs: Beliefs, y: Tensor) -> list[list[float]]:
    """Share of the labels inside the intervals of :data:`LEVELS`, of every regression."""
    found = []
    for k, belief in enumerate(beliefs):
        if belief.scale is None:
            continue
        halves = belief.halves
        if halves is None:
            dof = torch.tensor(belief.dof).double()
            ends = torch.stack([student_quantile((1 + level) / 2, dof) for level in LEVELS])
            halves = belief.scale[:, None] * ends
        inside = (y[:, k] - belief.mean).abs()[:, None] <= halves
        found.append(inside.double().mean(0).tolist())
    return found

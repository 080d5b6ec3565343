"""One scale (regression) or temperature (classification) a task, from data that nobody fitted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayesagg.predicting.data import Rows
from bayesagg.predicting.prediction import CHUNK
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments
from bayesagg.predicting.state import HeadPosterior
from bayesagg.predicting.student import NORMAL, student_density

__all__ = ["Collected", "calibrate_head"]

_KEPT = 1 << 23  # numbers that are kept of a task: enough for one or two parameters
_DOF = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0, 20.0, 40.0, 100.0, 1000.0)
_RANGE = (-3.0, 3.0)  # of the logarithm of a temperature


class Collected:
    """What of a head's predictions and labels a calibration needs, row by row.

    Of more data than fit, every second row is kept, then every fourth, and so on.

    Args:
        posterior: of the head.
    """

    def __init__(self, posterior: HeadPosterior) -> None:
        self.posterior = posterior
        self.parts: list[tuple[Tensor, ...]] = []
        self._step, self._size = 1, 0

    def add(self, rows: Rows) -> None:
        """Take in a batch."""
        step, post = self._step, self.posterior
        h = post.augmented(rows.features[::step]).double()
        y = rows.targets[::step].double()
        present = torch.ones_like(y) > 0 if rows.present is None else rows.present[::step]
        size = max(1, CHUNK // max(post.per_row(), 1))
        part: tuple[Tensor, ...]
        if post.layout.kind == "multiclass":
            seen = torch.ones_like(y[:, 0]) > 0 if rows.present is None else present
            spread = [post.factor(some) for some in h[seen].split(size)]
            part = (post.location(h)[seen], torch.cat(spread), y[seen])
        else:
            variance = torch.cat([post.variance(some) for some in h.split(size)])
            part = (post.location(h), variance, y, present)
        self.parts.append(part)
        self._size += sum(t.numel() for t in part)
        while self._size > _KEPT and self._step < 1 << 20:
            self._step *= 2
            self.parts = [tuple(t[::2] for t in part) for part in self.parts]
            self._size = sum(t.numel() for part in self.parts for t in part)

    def together(self) -> tuple[Tensor, ...]:
        """All rows."""
        return tuple(torch.cat(parts) for parts in zip(*self.parts, strict=True))


@torch.no_grad()
def calibrate_head(collected: Collected) -> None:
    """Set scale and degrees of freedom, or temperature, of a posterior."""
    posterior, rows = collected.posterior, collected.together()
    if posterior.layout.kind == "regression":
        scale, dof = _student(posterior, *rows)
        posterior.dof = dof.to(posterior.dof)
    elif posterior.layout.kind == "binary":
        scale = _binary_temperature(*rows)
    else:
        scale = _class_temperature(*rows)
    posterior.scale = scale.to(posterior.scale)


def _student(
    posterior: HeadPosterior, location: Tensor, variance: Tensor, y: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales and degrees of freedom of every output, ``[o]``, of greatest likelihood.

    A normal distribution, where the noise is given, stays one.
    """
    scales, dofs = [], []
    standard = (y - location) / (posterior.noise.double() + variance).sqrt()
    for k, given in enumerate(posterior.dof.tolist()):
        x = standard[present[:, k], k]
        if given >= NORMAL:
            scales.append(x.square().mean().sqrt())
            dofs.append(torch.full_like(scales[-1], given))
            continue
        fits = [_scale_of(x, nu) for nu in _DOF]
        best = max(fits, key=lambda fit: float(fit[1]))
        scales.append(best[0])
        dofs.append(x.new_tensor(_DOF[[f is best for f in fits].index(True)]))
    return torch.stack(scales).clamp_min(1e-6), torch.stack(dofs)


def _scale_of(x: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    """Scale of greatest likelihood of Student-t values, by EM, and its mean log-likelihood."""
    square = x.square()
    scale2 = square.median().clamp_min(1e-12)
    for _ in range(60):
        scale2 = ((nu + 1) * square / (nu + square / scale2)).mean().clamp_min(1e-12)
    scale = scale2.sqrt()
    density = student_density(x / scale, torch.full_like(x[:1], nu)) / scale
    return scale, density.clamp_min(torch.finfo(x.dtype).tiny).log().mean()


def _binary_temperature(mean: Tensor, variance: Tensor, y: Tensor, present: Tensor) -> Tensor:
    """Temperatures of every output, ``[o]``, of greatest likelihood of the labels."""

    def loss(log: Tensor) -> Tensor:
        t = log.exp()
        p, q, _ = sigmoid_moments(mean / t, variance.sqrt() / t)
        tiny = torch.finfo(p.dtype).tiny
        each = y * p.clamp_min(tiny).log() + (1 - y) * q.clamp_min(tiny).log()
        return -(each * present).sum(0) / present.sum(0)

    return _least(loss, mean.new_zeros(mean.shape[1])).exp()


def _class_temperature(mean: Tensor, factor: Tensor, y: Tensor) -> Tensor:
    size = max(1, CHUNK // (512 * mean.shape[1]))

    def loss(log: Tensor) -> Tensor:
        t, total = log.exp(), mean.new_zeros(1)
        for m, f, labels in zip(*(r.split(size) for r in (mean, factor, y)), strict=True):
            logs, weights = class_probabilities(m / t, f / t)
            total = total - (labels * (logs + weights.log()).logsumexp(2)).sum()
        return total / len(mean)

    return _least(loss, mean.new_zeros(1)).exp()


def _least(loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Where functions of one variable each are least, ``[T]``, by golden sections."""
    ratio = (5**0.5 - 1) / 2
    low, high = torch.full_like(like, _RANGE[0]), torch.full_like(like, _RANGE[1])
    one, two = high - ratio * (high - low), low + ratio * (high - low)
    first, second = loss(one), loss(two)
    for _ in range(24):
        left = first < second
        low, high = torch.where(left, low, one), torch.where(left, two, high)
        one, two = high - ratio * (high - low), low + ratio * (high - low)
        # Either is where the other was; evaluating both keeps all outputs in one call.
        first, second = loss(one), loss(two)
    return (low + high) / 2

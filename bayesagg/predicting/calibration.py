"""One scale (regression) or temperature (classification) a task, from data that nobody fitted."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import StudentT

from bayesagg.errors import NumericalWarning
from bayesagg.predicting.data import Rows
from bayesagg.predicting.prediction import Reading, by_rows
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments
from bayesagg.predicting.state import HeadPosterior
from bayesagg.predicting.student import NORMAL, half_widths

__all__ = ["Calibration"]

_KEPT = 1 << 23  # numbers that are kept of a task: enough for one or two parameters
_DOF = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 14.0, 20.0, 40.0, 100.0, 1000.0)


class Calibration:
    """What of a head's predictions and labels a calibration needs, row by row, and its fit.

    Of more data than fit, every second row is kept, then every fourth, and so on.
    """

    def __init__(self, posterior: HeadPosterior) -> None:
        self.posterior = posterior
        self.parts: list[tuple[Tensor, ...]] = []
        self._step = 1

    def add(self, rows: Rows) -> None:
        """Take in a batch."""
        posterior, present, step = self.posterior, rows.present, self._step
        reading = Reading(rows.features[::step].double(), [posterior])
        y = rows.targets[::step].double()
        present = None if present is None else present[::step]
        if posterior.head.kind == "multiclass":
            [spread] = by_rows(posterior.factor, posterior.per_row(), reading.h)
            part: tuple[Tensor, ...] = (reading.location, spread, y)
            part = part if present is None else tuple(t[present] for t in part)
        else:
            present = torch.ones_like(y).bool() if present is None else present
            part = (reading.location, reading.variance, y, present)
        self.parts.append(part)
        while sum(t.numel() for part in self.parts for t in part) > _KEPT and self._step < 1 << 20:
            self._step *= 2
            self.parts = [tuple(t[::2] for t in part) for part in self.parts]

    @torch.no_grad()
    def finish(self, name: str) -> None:
        """Set scale, degrees of freedom and intervals, or temperature, of the posterior.

        Warns:
            NumericalWarning: of labels of one class, or that are all predicted right, which tell
                no temperature: it is one then.
        """
        posterior = self.posterior
        rows = [torch.cat(parts) for parts in zip(*self.parts, strict=True)]
        if posterior.head.kind == "regression":
            scale, dof, halves = _student(posterior, *rows)
            posterior.keep(dof=dof, halves=halves)
        else:
            scale, one, right = (_binary if posterior.head.kind == "binary" else _classes)(*rows)
            lost = one | (right & (scale < 1))  # then colder is likelier without end
            if bool(lost.any()):
                place = int(lost.nonzero()[0])
                which = f" of output {place}" if len(lost) > 1 else ""
                what = "of one class" if bool(one[place]) else "predicted right"
                warnings.warn(
                    f"task {name!r}: all labels{which} to calibrate with are {what}, which tells "
                    f"no temperature: it is one. Calibrate with more data, of several classes.",
                    NumericalWarning,
                    stacklevel=4,
                )
                scale = torch.where(lost, 1.0, scale)
        posterior.keep(scale=scale)


def _student(
    posterior: HeadPosterior, location: Tensor, variance: Tensor, y: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and degrees of freedom of greatest likelihood, ``[o]``; half-widths of intervals.

    A normal distribution, where the noise is given, stays one.
    """
    found, halves = [], []
    standard = (y - location) / (posterior.noise.double() + variance).sqrt()
    for k, given in enumerate(posterior.dof.tolist()):
        x = standard[present[:, k], k]
        if given >= NORMAL:
            found.append((float(x.square().mean().sqrt()), given))
        else:
            found.append(max(_scale_of(x, nu) for nu in _DOF)[1:])
        halves.append(half_widths(x / max(found[-1][0], 1e-6), found[-1][1]))
    scales, dofs = x.new_tensor(found).unbind(1)
    return scales.clamp_min(1e-6), dofs, torch.stack(halves)


def _scale_of(x: Tensor, nu: float) -> tuple[float, float, float]:
    """Greatest mean log-likelihood of Student-t values, at which scale, by EM, and ν itself."""
    square = x.square()
    scale2 = square.median().clamp_min(1e-12)
    for _ in range(60):
        scale2 = ((nu + 1) * square / (nu + square / scale2)).mean().clamp_min(1e-12)
    scale = scale2.sqrt()
    return float(StudentT(nu, 0.0, scale).log_prob(x).mean()), float(scale), nu


def _binary(
    mean: Tensor, variance: Tensor, y: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature of greatest likelihood; whether labels are of one class; all predicted right.

    By output, ``[o]``.
    """

    def loss(t: Tensor) -> Tensor:
        p, q, _ = sigmoid_moments(mean / t, variance.sqrt() / t)
        tiny = torch.finfo(p.dtype).tiny
        each = y * p.clamp_min(tiny).log() + (1 - y) * q.clamp_min(tiny).log()
        return -(each * present).sum(0) / present.sum(0)

    one = ((y == 0) | ~present).all(0) | ((y == 1) | ~present).all(0)
    right = ((y == (mean > 0).to(y.dtype)) | ~present).all(0)
    return _least(loss, mean.new_zeros(mean.shape[1])), one, right


def _classes(mean: Tensor, factor: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As of binary outputs, of classes together, ``[1]``."""

    def loss(t: Tensor) -> Tensor:
        def losses(mean: Tensor, factor: Tensor, y: Tensor) -> Tensor:
            logs, weights = class_probabilities(mean / t, factor / t)
            return -(y * (logs + weights.log()).logsumexp(2)).sum(1)

        return by_rows(losses, 512 * mean.shape[1], mean, factor, y)[0].mean().view(1)

    one = (y.amax(0) > 0).sum(0, keepdim=True) == 1
    right = (y.gather(1, mean.argmax(1, keepdim=True)) == 1).all(0)
    return _least(loss, mean.new_zeros(1)), one, right


def _least(loss: Callable[[Tensor], Tensor], log: Tensor) -> Tensor:
    """Temperatures from 1/20 to 20 where functions of one each, ``[T]``, are least, by halving."""
    value = loss(log.exp())
    for step in range(1, 19):
        points = torch.stack([log, log - 3 / 2**step, log + 3 / 2**step])
        values = torch.stack([value, *(loss(point.exp()) for point in points[1:])])
        least = values.argmin(0, keepdim=True)
        log, value = points.gather(0, least)[0], values.gather(0, least)[0]
    return log.exp()

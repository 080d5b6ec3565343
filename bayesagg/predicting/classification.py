"""Classifications by Laplace: passes over the features to the mode, and the curvature there.

At the mode of ``Σ ℓ(W h̃) + |W|² / 2γ`` the posterior is normal with precision ``Λ + 1/γ``,
where ``Λ`` is the generalised Gauss-Newton curvature of :mod:`bayesagg.posterior`. Binary outputs
are independent; classes are in contrasts. Up to ``max_parameters`` outputs (contrasts) times
weights ``Λ`` is exact. Beyond, ``Λ ≈ C̄ ⊗ H̃ᵀH̃`` with the mean ``C̄`` of ``diag p - p pᵀ`` over the
data (Kronecker), of a binary output ``c̄ H̃ᵀH̃`` with its mean ``p (1 - p)``.

Steps are those of L-BFGS around the curvature, exact or not. Those that raise the objective are
halved, so that no start is too far. With the gradient ``g`` and the inverse curvature ``S`` that is
known of them, ``gᵀSg`` is the squared distance to the mode in standard deviations of the posterior;
no logit is further from that at the mode, in its own standard deviations (Cauchy-Schwarz).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.errors import NumericalWarning
from bayesagg.posterior import augment, contrast_basis, multiclass_statistics, weighted_gram
from bayesagg.predicting.curvature import Curvature, Exact, Kronecker
from bayesagg.predicting.data import CHUNK, Rows
from bayesagg.predicting.regression import Prior
from bayesagg.predicting.state import Inferred

__all__ = ["MAX_PARAMETERS", "laplace"]

MAX_PARAMETERS = 2560  # rows of an exact curvature of classes: 50 MB in float64
_NEAR, _FAR = 5e-4, 0.3  # standard deviations from the mode: to stop at, to warn from
_PAIRS, _PRIORS = 10, 30


@dataclass(frozen=True)
class _Point:
    """Weights ``[G, M]``, the objective without the prior, its gradient there, and a curvature."""

    weights: Tensor
    value: Tensor
    gradient: Tensor
    curvature: Curvature

    def with_prior(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        """The objective, ``[G]``, and its gradient."""
        value = self.value + 0.5 * precision * self.weights.square().sum(1)
        return value, self.gradient + precision[:, None] * self.weights


def laplace(
    name: str,
    kind: str,
    start: Tensor,
    bias: bool,
    data: Callable[[], Iterable[Rows]],
    prior: Prior,
    *,
    passes: int,
    max_parameters: int,
) -> Inferred:
    """Posterior of a head.

    Args:
        name: of the task, for the warning.
        kind: ``"binary"`` or ``"multiclass"``.
        start: weights, ``[o, D]``, bias last.
        bias: whether there is one.
        data: passes over all labels of the head.
        prior: of the weights.
        passes: at most so many over the data, for each value of a prior that is learned.
        max_parameters: rows of an exact curvature.

    Warns:
        NumericalWarning: if the mode was not reached.
    """
    basis = None if kind == "binary" else contrast_basis(len(start), start.double())
    weights = start.double() if basis is None else (basis @ start.double()).view(1, -1)
    visit = _Passes(data, bias, basis, weights.numel() <= max_parameters)
    precision = weights.new_full((len(weights),), 1 / prior.variance)
    point, left = _mode(visit(weights), precision, visit, passes)
    for _ in range(_PRIORS if prior.learned else 0):
        square = point.weights.square().sum(1).clamp_min(1e-12)
        new = (point.curvature.determined(precision) / square).clamp(1e-8, 1e8)
        done = bool(((new / precision).log().abs() < 1e-3).all())
        precision = new
        point, left = _mode(point, precision, visit, passes)
        if done:
            break
    if left > _FAR:
        warnings.warn(
            f"task {name!r}: the mode was not reached in {passes} passes over the data, it is some "
            f"{left:.2g} standard deviations away. Predictions are those around where they ended; "
            f"allow more by passes=.",
            NumericalWarning,
            stacklevel=5,
        )
    mode = point.weights
    if visit.exact and left <= _NEAR:  # one more step, which needs no pass
        mode = mode - point.curvature.solve(point.with_prior(precision)[1], precision)
    return point.curvature.inferred(mode, precision)


def _mode(point: _Point, precision: Tensor, visit: _Passes, passes: int) -> tuple[_Point, float]:
    """Steps from a point, each with a pass for the gradient; and how far it is from the mode.

    An exact curvature is the costly part of a pass. It serves on as long as every step leaves a
    tenth of the squared distance, and is taken anew otherwise; in the end it is that of the mode.
    """
    pairs: list[tuple[Tensor, Tensor]] = []  # steps and what they changed of the gradient
    value, gradient = point.with_prior(precision)
    fresh, length, before = True, torch.ones_like(value), torch.full_like(value, torch.inf)
    for last in range(passes, -1, -1):
        step = _direction(gradient, pairs, point.curvature, precision)
        distance = (gradient * step).sum(1)
        left = float(distance.max().sqrt())
        if left <= _NEAR or not last:
            return (point if fresh else visit(point.weights)), left
        slow = bool(((distance > 0.1 * before) & (distance > _NEAR**2)).any())
        known = None if slow or not visit.exact else point.curvature
        trial = visit(point.weights - length[:, None] * step, known)
        found, new = trial.with_prior(precision)
        better = found <= value + 1e-12 * value.abs()
        keep = better[:, None]
        pairs = [
            *pairs[-_PAIRS + 1 :],
            (keep * (trial.weights - point.weights), keep * (new - gradient)),
        ]
        before = torch.where(better, distance, before)
        fresh = known is None and bool(better.all())
        if not fresh:
            trial = _Point(
                torch.where(keep, trial.weights, point.weights),
                torch.where(better, trial.value, point.value),
                torch.where(keep, trial.gradient, point.gradient),
                trial.curvature if bool(better.all()) else point.curvature,
            )
        point = trial
        value, gradient = point.with_prior(precision)
        length = torch.where(better, 1.0, length / 2)
    raise AssertionError


def _direction(
    gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], curvature: Curvature, precision: Tensor
) -> Tensor:
    """Of L-BFGS (Nocedal and Wright 2006, algorithm 7.4) around a curvature.

    Where a step was not taken, its pair is zero and does nothing.
    """
    weights = [1 / (s * y).sum(1, keepdim=True) for s, y in pairs]
    weights = [w.nan_to_num(0.0, 0.0, 0.0) for w in weights]
    shares = []
    for (s, y), w in zip(reversed(pairs), reversed(weights), strict=True):
        shares.append(w * (s * gradient).sum(1, keepdim=True))
        gradient = gradient - shares[-1] * y
    step = curvature.solve(gradient, precision)
    for (s, y), w, share in zip(pairs, weights, reversed(shares), strict=True):
        step = step + s * (share - w * (y * step).sum(1, keepdim=True))
    return step


class _Passes:
    """Value, gradient and curvature of a head's likelihood, each time by a pass over the data.

    Args:
        data: starts a pass.
        bias: whether ``h̃`` has a constant.
        basis: of the contrasts; ``None`` of binary outputs.
        exact: the curvature.
    """

    def __init__(
        self, data: Callable[[], Iterable[Rows]], bias: bool, basis: Tensor | None, exact: bool
    ) -> None:
        self.data, self.bias, self.basis, self.exact = data, bias, basis, exact
        self._gram: tuple[Tensor, Tensor] | None = None  # its eigenvalues and eigenvectors

    def __call__(self, flat: Tensor, known: Curvature | None = None) -> _Point:
        """At weights ``[G, M]``; with a known curvature, or that at this point."""
        weights = flat if self.basis is None else flat.view(len(self.basis), -1)
        total: list[Tensor] = []
        count = 0
        for rows in self.data():
            h, y, present = augment(rows.features.double(), self.bias), rows.targets, rows.present
            if self.basis is None:
                z, y = h @ weights.mT, y.double()
                value, error = (
                    F.binary_cross_entropy_with_logits(z, y, reduction="none"),
                    z.sigmoid() - y,
                )
                if present is not None:
                    value, error = value * present, error * present
                found = [value.sum(0), error.mT @ h]
            else:
                h, y = (h, y.double()) if present is None else (h[present], y[present].double())
                z = h @ weights.mT @ self.basis
                error = (z.softmax(1) - y) @ self.basis.mT
                found = [-(y * z.log_softmax(1)).sum().view(1), error.mT @ h]
            if known is None:
                found += self._curved(h, y, z, present)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            count += len(h)
        value, gradient = total[0], total[1].view_as(flat)
        return _Point(flat, value, gradient, known or self._curvature(total[2:], count))

    def _curved(self, h: Tensor, y: Tensor, z: Tensor, present: Tensor | None) -> list[Tensor]:
        """Sums for a curvature: its matrix, or the two sides, as far as they are not known."""
        gram = [] if self.exact or self._gram is not None else [h.mT @ h]
        if self.basis is None:
            c = z.sigmoid() * (-z).sigmoid()
            c = c if present is None else c * present
            return [weighted_gram(h, c)] if self.exact else [c.sum(0), *gram]
        if self.exact:
            size = max(1, CHUNK // (len(self.basis) ** 2 + h.shape[1]))
            parts = zip(h.split(size), y.split(size), z.split(size), strict=True)
            return [sum((multiclass_statistics(*p)[0] for p in parts), h.new_zeros(()))[None]]
        p = z.softmax(1)
        mean = p @ self.basis.mT
        return [self.basis * p.sum(0) @ self.basis.mT - mean.mT @ mean, *gram]

    def _curvature(self, sums: list[Tensor], count: int) -> Curvature:
        if self.exact:
            return Exact(sums[0], self.basis)
        if self._gram is None:
            values, vectors = torch.linalg.eigh(sums[1])
            self._gram = values.clamp_min(0), vectors
        left, turn = sums[0] / count, None
        if self.basis is not None:
            left, turn = torch.linalg.eigh(left)
        return Kronecker(left.clamp_min(0), turn, *self._gram, self.basis)

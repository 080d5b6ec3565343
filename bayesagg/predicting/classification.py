"""Classifications by Laplace: passes over the features to the mode, and the curvature there.

At the mode of ``Σ ℓ(W h̃) + |W|² / 2γ`` the posterior is normal with precision ``Λ + 1/γ``,
where ``Λ`` is the generalised Gauss-Newton curvature of :mod:`bayesagg.posterior`. Binary outputs
are independent; classes are in contrasts. Up to ``max_parameters`` outputs (contrasts) times
weights ``Λ`` is exact. Beyond, ``Λ ≈ C̄ ⊗ H̃ᵀH̃`` with the mean ``C̄`` of ``diag p - p pᵀ`` over the
data (Kronecker), of a binary output ``c̄ H̃ᵀH̃`` with its mean ``p (1 - p)``.

Steps are those of L-BFGS around the Kronecker product, which costs next to nothing, and in the end
around the exact curvature. Those that raise the objective are halved, so that no start is too far.
With the gradient ``g`` and the inverse curvature ``S`` that is known of them, ``gᵀSg`` is the
squared distance to the mode in standard deviations of the posterior; no logit is further from that
at the mode, in its own standard deviations (Cauchy-Schwarz).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.errors import NumericalWarning
from bayesagg.heads import Head, stacked
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
    """Weights ``[G, M]``, the objective, its gradient and its curvature there."""

    weights: Tensor
    value: float
    gradient: Tensor
    curvature: Curvature


def laplace(
    name: str,
    head: Head,
    data: Callable[[], Iterable[Rows]],
    prior: Prior,
    passes: int,
    max_parameters: int,
) -> Inferred:
    """Posterior of a head of binary outputs or of classes, whose weights are the start.

    At most ``passes`` over the data for each value of a prior that is learned; a warning if the
    mode was not reached. ``max_parameters``: rows of an exact curvature.
    """
    if passes < 0:
        raise ValueError(f"passes must be an integer >= 0, got {passes!r}.")
    weights, basis = stacked(head).double(), None
    if head.kind == "multiclass":
        basis = contrast_basis(len(weights), weights)
        weights = (basis @ weights).view(1, -1)
    exact = weights.numel() <= max_parameters
    visit = _Passes(data, head.has_bias, basis, prior)
    precision = weights.new_full((len(weights),), 1 / prior.variance)
    for more in range(_PRIORS if prior.learned else 0, -1, -1):
        few = passes // 2 if exact else passes
        point, left, used = _mode(visit, weights, precision, False, few)
        if exact:
            point, left, _ = _mode(visit, point.weights, precision, True, passes - used)
        if not more:
            break
        square = point.weights.square().sum(1).clamp_min(1e-12)
        new = (point.curvature.determined() / square).clamp(1e-8, 1e8)
        if bool(((new / precision).log().abs() < 1e-3).all()):
            break
        weights, precision = point.weights, new
    if left > _FAR:
        warnings.warn(
            f"task {name!r}: the mode was not reached in {passes} passes over the data, it is some "
            f"{left:.2g} standard deviations away. Predictions are those around where they ended; "
            f"allow more by passes=.",
            NumericalWarning,
            stacklevel=5,
        )
    mode = point.weights
    if exact and left <= _NEAR:  # one more step, which needs no pass
        mode = mode - point.curvature.solve(point.gradient)
    return point.curvature.inferred(mode)


def _mode(
    visit: _Passes, start: Tensor, precision: Tensor, exact: bool, passes: int
) -> tuple[_Point, float, int]:
    """Where steps lead, how far that is from the mode, and after how many more passes."""
    point, length = visit(start, precision, exact), 1.0
    pairs: list[tuple[Tensor, Tensor]] = []  # steps and what they changed of the gradient
    for used in range(passes + 1):
        step = _direction(point, pairs)
        left = float((point.gradient * step).sum(1).max().sqrt())
        if left <= _NEAR or used == passes:
            break
        trial = visit(point.weights - length * step, precision, exact)
        if trial.value > point.value + 1e-12 * abs(point.value):
            length /= 2
            continue
        change = trial.weights - point.weights, trial.gradient - point.gradient
        pairs, point, length = [*pairs[-_PAIRS + 1 :], change], trial, 1.0
    return point, left, used


def _direction(point: _Point, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of L-BFGS around the curvature (Nocedal and Wright 2006, algorithm 7.4)."""
    gradient = point.gradient
    # A problem that is solved does not move on: its pair is zero and does nothing.
    weights = [(1 / (s * y).sum(1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0) for s, y in pairs]
    shares = []
    for (s, y), w in zip(reversed(pairs), reversed(weights), strict=True):
        shares.append(w * (s * gradient).sum(1, keepdim=True))
        gradient = gradient - shares[-1] * y
    step = point.curvature.solve(gradient)
    for (s, y), w, share in zip(pairs, weights, reversed(shares), strict=True):
        step = step + s * (share - w * (y * step).sum(1, keepdim=True))
    return step


class _Passes:
    """Objective, gradient and curvature of a head, each time by a pass over the data.

    ``basis``: of the contrasts; ``None`` of binary outputs. ``prior``: whose precision is given, of
    features that are not small.
    """

    def __init__(
        self,
        data: Callable[[], Iterable[Rows]],
        bias: bool,
        basis: Tensor | None,
        prior: Prior,
    ) -> None:
        self.data, self.bias, self.basis, self.prior = data, bias, basis, prior
        self._gram: tuple[Tensor, Tensor] | None = None  # its eigenvalues and eigenvectors
        self._times = torch.ones(1)  # what the variance is multiplied by

    def __call__(self, flat: Tensor, precision: Tensor, exact: bool) -> _Point:
        """At weights ``[G, M]``, with the precision of the prior and a curvature of either kind."""
        weights = flat if self.basis is None else flat.view(len(self.basis), -1)
        total: list[Tensor] = []
        count = 0
        for rows in self.data():
            h, y, present = augment(rows.features.double(), self.bias), rows.targets, rows.present
            if self.basis is None:
                found = _binary(h, y.double(), present, weights, exact)
            else:
                h, y = (h, y) if present is None else (h[present], y[present])
                found = _multiclass(h, y.double(), weights, self.basis, exact)
            if not exact and self._gram is None:
                found.append(h.mT @ h)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            count += len(h)
        value, gradient, curvature, *gram = total
        if gram:
            values, vectors = torch.linalg.eigh(gram[0])
            self._gram = values.clamp_min(0), vectors
            squares = gram[0].diagonal()[None, : len(values) - self.bias]
            self._times = self.prior.of_features(squares, squares.new_tensor([float(count)]))
        precision = precision / self._times
        value = value + 0.5 * (precision * flat.square().sum(1)).sum()
        gradient = gradient.view_as(flat) + precision[:, None] * flat
        if exact:
            return _Point(flat, float(value), gradient, Exact(curvature, precision, self.basis))
        assert self._gram is not None
        left, turn = curvature / count, None
        if self.basis is not None:
            left, turn = torch.linalg.eigh(left)
        product = Kronecker(left.clamp_min(0), turn, *self._gram, precision, self.basis)
        return _Point(flat, float(value), gradient, product)


def _binary(
    h: Tensor, y: Tensor, present: Tensor | None, weights: Tensor, exact: bool
) -> list[Tensor]:
    """Loss, its gradient ``[K, D]``, and its curvature ``[K, D, D]`` or sums of ``p (1 - p)``."""
    z = h @ weights.mT
    loss, error = F.binary_cross_entropy_with_logits(z, y, reduction="none"), z.sigmoid() - y
    c = z.sigmoid() * (-z).sigmoid()
    if present is not None:
        loss, error, c = loss * present, error * present, c * present
    return [loss.sum(), error.mT @ h, weighted_gram(h, c) if exact else c.sum(0)]


def _multiclass(h: Tensor, y: Tensor, weights: Tensor, basis: Tensor, exact: bool) -> list[Tensor]:
    """Loss, its gradient ``[E, D]``, and its curvature ``[1, E D, E D]`` or that of contrasts."""
    z = h @ weights.mT @ basis
    p = z.softmax(1)
    if exact:
        size = max(1, CHUNK // (len(basis) ** 2 + h.shape[1]))
        parts = zip(h.split(size), y.split(size), z.split(size), strict=True)
        curvature = sum((multiclass_statistics(*p)[0] for p in parts), h.new_zeros(()))[None]
    else:
        mean = p @ basis.mT
        curvature = basis * p.sum(0) @ basis.mT - mean.mT @ mean
    return [F.cross_entropy(z, y, reduction="sum"), basis @ (p - y).mT @ h, curvature]

"""Classifications by Laplace: Newton passes to the mode, and the curvature there.

At the mode of ``Σ ℓ(W h̃) + |W|² / 2γ`` the posterior is normal with precision ``Λ + 1/γ``,
where ``Λ`` is the generalised Gauss-Newton curvature of :mod:`bayesagg.posterior`. Steps that raise
the objective are halved, so that no start is too far.

Binary outputs are independent. Classes are exact, in contrasts, up to ``max_parameters`` rows of
``Λ``; beyond, ``Λ ≈ C̄ ⊗ H̃ᵀH̃`` with the mean ``C̄`` of ``diag p - p pᵀ`` over the data (Kronecker).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.errors import NumericalWarning
from bayesagg.posterior import (
    augment,
    contrast_basis,
    multiclass_statistics,
    weighted_gram,
)
from bayesagg.predicting.curvature import Contrasts, Curvature, Kronecker, Outputs
from bayesagg.predicting.data import Rows
from bayesagg.predicting.regression import Prior
from bayesagg.predicting.state import Inferred

__all__ = ["MAX_PARAMETERS", "laplace"]

MAX_PARAMETERS = 2560  # rows of an exact curvature of classes: 50 MB in float64
_CHUNK = 1 << 22
_TOLERANCE = 1e-12  # of the expected decrease, relative to the objective
_HALVINGS, _PRIORS = 12, 30

Passes = Callable[[], Iterable[Rows]]  # over all data


@dataclass(frozen=True)
class _Point:
    """Weights, the objective without the prior, its gradient there, and a curvature."""

    weights: Tensor
    value: Tensor
    gradient: Tensor
    curvature: Curvature


Evaluate = Callable[[Tensor, Curvature | None], _Point]  # with the curvature there, or a known one


def laplace(
    name: str,
    kind: str,
    start: Tensor,
    bias: bool,
    data: Passes,
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
        max_parameters: rows of an exact curvature of classes.

    Warns:
        NumericalWarning: if the mode was not reached.
    """
    weights = start.double()
    evaluate: Evaluate
    if kind == "binary":

        def evaluate(w: Tensor, curvature: Curvature | None) -> _Point:
            return _binary(w, bias, data(), curvature)
    else:
        basis = contrast_basis(len(start), weights)
        exact = len(basis) * start.shape[1] <= max_parameters
        weights = (basis @ weights).view(1, -1)

        def evaluate(w: Tensor, curvature: Curvature | None) -> _Point:
            return _classes(w, basis, bias, data(), exact, curvature)

    precision = weights.new_full((len(weights),), 1 / prior.variance)
    point, reached = _mode(evaluate(weights, None), precision, evaluate, passes)
    for _ in range(_PRIORS if prior.learned else 0):
        square = point.weights.square().sum(1).clamp_min(1e-12)
        new = (point.curvature.determined(precision) / square).clamp(1e-8, 1e8)
        done = bool(((new / precision).log().abs() < 1e-3).all())
        precision = new
        point, reached = _mode(point, precision, evaluate, passes)
        if done:
            break
    if not reached:
        warnings.warn(
            f"task {name!r}: the mode was not reached in {passes} passes over the data. "
            f"Predictions are those around where they ended; allow more by passes=.",
            NumericalWarning,
            stacklevel=4,
        )
    mode = point.weights
    if reached:  # one more step, which needs no pass
        mode = mode - point.curvature.solve(point.gradient + precision[:, None] * mode, precision)
    return point.curvature.inferred(mode, precision)


def _mode(point: _Point, precision: Tensor, evaluate: Evaluate, passes: int) -> tuple[_Point, bool]:
    """Damped Newton steps from a point, each with a pass for the gradient.

    The curvature is the costly part of a pass. It serves on as long as every step leaves a tenth of
    the expected decrease at most, and is taken with every step otherwise; in the end it is that of
    the mode.
    """

    def objective(at: _Point) -> Tensor:
        return at.value + 0.5 * precision * at.weights.square().sum(1)

    value, halved, fresh, fast = objective(point), 0, True, True
    length, before = torch.ones_like(value), torch.full_like(value, torch.inf)
    for _ in range(passes + 1):
        gradient = point.gradient + precision[:, None] * point.weights
        step = point.curvature.solve(gradient, precision)
        decrease = (gradient * step).sum(1)
        small = decrease <= _TOLERANCE * (1 + value.abs())
        if bool(small.all()):
            return (point if fresh else evaluate(point.weights, None)), True
        if halved == 0:
            fast = not bool((~small & (decrease > 0.1 * before)).any())
        trial = evaluate(point.weights - length[:, None] * step, point.curvature if fast else None)
        found = objective(trial)
        better = found <= value + 1e-12 * value.abs()
        if bool(better.all()):
            point, value, fresh, halved = trial, found, not fast, 0
            length, before = torch.ones_like(length), decrease
            continue
        halved += 1
        if halved > _HALVINGS:
            break
        # Of those that got better the step counts; the others try half of theirs again.
        length = torch.where(better, 1.0, length / 2)
        point, value = _mixed(~better, point, trial), torch.where(better, found, value)
        fresh = fresh and not bool(better.any())
    return (point if fresh else evaluate(point.weights, None)), False


def _mixed(stay: Tensor, old: _Point, new: _Point) -> _Point:
    """Old points where they stay, new ones elsewhere; the old curvature will do for a step."""
    keep = stay[:, None]
    return _Point(
        torch.where(keep, old.weights, new.weights),
        torch.where(stay, old.value, new.value),
        torch.where(keep, old.gradient, new.gradient),
        old.curvature,
    )


def _binary(weights: Tensor, bias: bool, data: Iterable[Rows], known: Curvature | None) -> _Point:
    value = weights.new_zeros(len(weights))
    gradient, matrix = torch.zeros_like(weights), None
    for rows in data:
        h, y = augment(rows.features.double(), bias), rows.targets.double()
        z = h @ weights.mT
        loss = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        error, curvature = z.sigmoid() - y, z.sigmoid() * (-z).sigmoid()
        if rows.present is not None:
            loss, error, curvature = (part * rows.present for part in (loss, error, curvature))
        value, gradient = value + loss.sum(0), gradient + error.mT @ h
        if known is None:
            part = weighted_gram(h, curvature)
            matrix = part if matrix is None else matrix + part
    if matrix is not None:
        known = Outputs(matrix)
    assert known is not None
    return _Point(weights, value, gradient, known)


def _classes(
    weights: Tensor,
    basis: Tensor,
    bias: bool,
    data: Iterable[Rows],
    exact: bool,
    known: Curvature | None,
) -> _Point:
    value, gradient = weights.new_zeros(1), torch.zeros_like(weights).view(len(basis), -1)
    matrix: Tensor | None = None
    sides: list[Tensor] = []
    count = weights.new_zeros(())
    w = weights.view(len(basis), -1)
    for rows in data:
        h, y = augment(rows.features.double(), bias), rows.targets.double()
        if rows.present is not None:
            h, y = h[rows.present], y[rows.present]
        z = h @ w.mT @ basis
        value = value - (y * z.log_softmax(1)).sum()
        p = z.softmax(1)
        gradient = gradient + ((p - y) @ basis.mT).mT @ h
        if known is not None:
            continue
        if exact:
            part = sum(
                multiclass_statistics(hc, yc, zc)[0]
                for hc, yc, zc in zip(*(t.split(_split(h, basis)) for t in (h, y, z)), strict=True)
            )
            matrix = part if matrix is None else matrix + part  # type: ignore[assignment]
        else:
            mean = p @ basis.mT
            side = basis @ torch.diag(p.sum(0)) @ basis.mT - mean.mT @ mean
            new = [side, h.mT @ h]
            sides = [a + b for a, b in zip(sides, new, strict=True)] if sides else new
            count = count + len(h)
    flat = gradient.view(1, -1)
    if known is not None:
        return _Point(weights, value, flat, known)
    if matrix is not None:
        return _Point(weights, value, flat, Contrasts(matrix[None], classes=basis.shape[1]))
    left, right = torch.linalg.eigh(sides[0] / count), torch.linalg.eigh(sides[1])
    pair = tuple((values.clamp_min(0), vectors) for values, vectors in (left, right))
    return _Point(weights, value, flat, Kronecker(*pair))


def _split(h: Tensor, basis: Tensor) -> int:
    """Data at once: the curvatures of all pairs of contrasts are in memory."""
    return max(1, _CHUNK // (len(basis) ** 2 + h.shape[1]))

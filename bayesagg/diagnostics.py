"""What to watch while training: whether to weigh tasks, their conflict, calibration of classifiers.

Numbers only; :mod:`bayesagg.plots` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.advice import Advice, advise
from bayesagg.predicting import RegressionPrediction
from bayesagg.reading.hooks import flatten

__all__ = [
    "Advice",
    "Reliability",
    "advise",
    "brier_score",
    "expected_calibration_error",
    "gradient_certainty",
    "gradient_conflict",
    "interval_coverage",
    "reliability",
]


def gradient_conflict(mean: Tensor) -> Tensor:
    """How often a task's gradient points away from another's, data and other tasks pooled.

    Two gradients conflict where their inner product is negative, as in PCGrad (Yu et al., 2020).

    Args:
        mean: ``E[g]``, or any gradients, ``[N, K, d]`` with ``K >= 2``.

    Returns:
        share of the data and other tasks that each task conflicts with, ``[K]``, 0 to 1.

    Raises:
        ValueError: for another shape.
    """
    _check_moments(mean)
    if mean.shape[1] < 2:
        raise ValueError("conflict needs at least two tasks, got one")
    negative = (mean @ mean.mT < 0).to(mean.dtype)  # [N, K, K], the diagonal is never negative
    return negative.sum((0, 2)) / (len(mean) * (mean.shape[1] - 1))


def gradient_certainty(mean: Tensor, variance: Tensor) -> Tensor:
    """Signal to noise ratio of each task's gradient: ``‖E[g]‖ / √(Σ_d Var[g]_d)``.

    Args:
        mean: ``E[g]``, ``[N, K, d]``.
        variance: ``Var[g]``, ``[N, K, d]``.

    Returns:
        median over the data, ``[K]``; below one the uncertainty is larger than the gradient.

    Raises:
        ValueError: for another shape.
    """
    _check_moments(mean)
    if variance.shape != mean.shape:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)}, variance {tuple(variance.shape)}; they must agree"
        )
    noise = variance.sum(-1).sqrt().clamp(min=torch.finfo(mean.dtype).tiny)
    ratio: Tensor = torch.linalg.vector_norm(mean, dim=-1) / noise
    return ratio.median(0).values


def interval_coverage(
    prediction: RegressionPrediction, targets: Tensor, levels: Sequence[float]
) -> Tensor:
    """Share of the labels that lie in the predicted intervals; calibrated: the level itself.

    Args:
        prediction: of a regression.
        targets: of the shape of its mean; NaN where missing.
        levels: of the intervals, ``L`` numbers between 0 and 1.

    Returns:
        by level and output of the head, ``[L, o]``; NaN of an output without labels.

    Raises:
        ValueError: for another shape, or a level out of range.
    """
    if targets.shape != prediction.mean.shape:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}, the prediction "
            f"{tuple(prediction.mean.shape)}"
        )
    first = prediction.posterior.head.channels_first
    seen, shares = ~targets.isnan(), []
    for level in levels:
        low, high = prediction.interval(level)
        inside = (targets >= low) & (targets <= high)
        shares.append(flatten(inside & seen, first).sum(0) / flatten(seen, first).sum(0))
    return torch.stack(shares)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: one entry per bin of the confidence, ``[bins]`` each.

    Attributes:
        confidence: mean confidence in the bin; NaN where it is empty.
        accuracy: share of right predictions in the bin; NaN where it is empty.
        count: predictions in the bin.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def reliability(probabilities: Tensor, targets: Tensor, bins: int = 15) -> Reliability:
    """Accuracy against confidence, the probability of the predicted class (Naeini et al., 2015).

    Args:
        probabilities: of all classes, ``[N, C]``, or of the second of two, ``[N]`` or ``[N, 1]``.
        targets: class indices, ``[N]``, or of the shape of such probabilities.
        bins: number of bins of equal width on [0, 1].

    Returns:
        the diagram.

    Raises:
        ValueError: for shapes that do not fit, values that are no probabilities or no classes, no
            data, or no bins.
    """
    if bins < 1:
        raise ValueError(f"bins must be a positive number, got {bins!r}")
    p, y = _predictions(probabilities, targets)
    confidence, predicted = p.max(1)
    right = (predicted == y).to(p.dtype)
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)  # (0, 1/bins], …
    count, sure, hits = (
        torch.bincount(place, value, bins) for value in (torch.ones_like(right), confidence, right)
    )
    return Reliability(sure / count, hits / count, count)


def expected_calibration_error(probabilities: Tensor, targets: Tensor, bins: int = 15) -> float:
    """ECE: mean distance of accuracy and confidence over the bins, weighted by their counts.

    Arguments and errors are those of :func:`reliability`; the paper takes 15 bins.

    Returns:
        a number between 0 (best) and 1.
    """
    table = reliability(probabilities, targets, bins)
    gap = (table.accuracy - table.confidence).abs().nan_to_num()
    return float((gap * table.count).sum() / table.count.sum())


def brier_score(probabilities: Tensor, targets: Tensor) -> float:
    """Squared distance of the probabilities from the one-hot label, averaged over the data.

    Summed over classes, as Brier (1950) has it; divide by their number for a mean. Arguments and
    errors are those of :func:`reliability`.

    Returns:
        a number between 0 (best) and 2.
    """
    p, y = _predictions(probabilities, targets)
    one_hot = torch.zeros_like(p).scatter_(1, y[:, None], 1)
    return float((p - one_hot).square().sum(1).mean())


def _check_moments(mean: Tensor) -> None:
    if mean.dim() != 3 or 0 in mean.shape:
        raise ValueError(f"expected [data, tasks, dimensions], got shape {tuple(mean.shape)}")


def _predictions(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of all classes ``[N, C]`` in float64, and class indices ``[N]``."""
    p, given = (torch.as_tensor(t).detach() for t in (probabilities, targets))
    shapes = f"{tuple(p.shape)} and {tuple(given.shape)}"
    p = p.double()
    if p.dim() == 2 and p.shape[1] == 1:  # of a head with one binary output
        p, given = p[:, 0], given[:, 0] if given.dim() == 2 else given
    if p.dim() == 1:
        p = torch.stack([1 - p, p], dim=1)
    if p.dim() != 2 or given.shape != p.shape[:1] or len(p) == 0:
        raise ValueError(
            f"expected probabilities [N] or [N, C] and class indices [N], got {shapes}; of several "
            f"binary outputs pass one at a time"
        )
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("probabilities must lie in [0, 1]; pass them after the softmax or sigmoid")
    if not bool(((p.sum(1) - 1).abs() < 0.05).all()):
        raise ValueError(
            "probabilities of the classes must sum to one; of several binary outputs pass one at "
            "a time, [N]"
        )
    y = given.nan_to_num(-1).long()
    if not bool(((y == given) & (y >= 0) & (y < p.shape[1])).all()):
        raise ValueError(
            f"class indices must be whole numbers from 0 to {p.shape[1] - 1}; leave data without "
            f"a label out"
        )
    return p, y.to(p.device)

"""Whether probabilities and intervals can be taken at their word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from bayesagg.diagnostics import expected_calibration_error, reliability
from bayesagg.plots.style import (
    BLUE,
    COLOURS,
    VERMILLION,
    Values,
    array,
    line_style,
    new_axes,
    polish,
    shown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration", "plot_coverage", "plot_predictions", "plot_reliability"]


def plot_reliability(
    probabilities: Values, targets: Values, *, bins: int = 15, ax: Axes | None = None
) -> Axes:
    """Reliability diagram: accuracy against confidence, with the share of the data in each bin.

    Arguments and errors are those of :func:`bayesagg.diagnostics.reliability`, but for ``ax``, to
    draw into.

    Returns:
        the Axes: light bars are the share of the data, the line the accuracy; the title has the
        expected calibration error.
    """
    p, y = torch.as_tensor(probabilities), torch.as_tensor(targets)
    table = reliability(p, y, bins)
    confidence, accuracy, count = (
        value.cpu().numpy() for value in (table.confidence, table.accuracy, table.count)
    )
    used = count > 0
    ax, own = new_axes(ax, (5.4, 5.2))
    ax.bar(
        np.arange(bins) / bins,
        count / count.sum(),
        1 / bins,
        align="edge",
        color="0.85",
        ec="white",
        label="share of the data",
    )
    ax.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1.5, label="calibrated")
    ax.plot(confidence[used], accuracy[used], color=BLUE, marker="o", lw=2, label="accuracy")
    ax.set(xlabel="confidence [probability of the predicted class]", xlim=(0, 1), ylim=(0, 1))
    ax.set_ylabel("accuracy, share of the data [0 to 1]")
    ax.set_title(f"expected calibration error {expected_calibration_error(p, y, bins):.3f}")
    ax.legend(loc="upper left", frameon=False)
    return polish(ax, own)


def plot_calibration(
    scores: Mapping[str, tuple[float, float]],
    *,
    highlight: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """ECE against Brier score, one point per method (Figure 4); both are better lower.

    Args:
        scores: ``(ECE, Brier score)`` by method, as
            :func:`bayesagg.diagnostics.expected_calibration_error` and
            :func:`bayesagg.diagnostics.brier_score` give them.
        highlight: name of a method to draw in another colour and shape.
        ax: to draw into.

    Returns:
        the Axes with one labelled point per method.

    Raises:
        ValueError: if there is nothing to draw, or a score is not finite.
    """
    if not scores:
        raise ValueError("no scores to draw: pass (ECE, Brier score) by the name of the method")
    points = array([list(pair) for pair in scores.values()], "methods, 2")
    ax, own = new_axes(ax)
    for name, (ece, brier) in zip(scores, points, strict=True):
        chosen = name == highlight
        colour, marker = (VERMILLION, "D") if chosen else (COLOURS[0], "o")
        ax.plot(ece, brier, ls="none", marker=marker, ms=9, color=colour, label=name)
        ax.annotate(name, (ece, brier), (8, 4), textcoords="offset points", fontsize=12)
    ax.margins(0.2)
    ax.set_xlabel("expected calibration error [0 to 1, lower is better]")
    ax.set_ylabel("Brier score [0 to 2, lower is better]")
    return polish(ax, own)


def plot_predictions(
    targets: Values,
    mean: Values,
    lower: Values,
    upper: Values,
    *,
    unit: str = "units of the label",
    ax: Axes | None = None,
) -> Axes:
    """Predictions against the truth, each with its interval.

    Args:
        targets: true values, ``[N]``.
        mean: predicted values, ``[N]``.
        lower: lower ends of the intervals, ``[N]``, as of ``prediction.interval(level)``.
        upper: upper ends, ``[N]``.
        unit: of all four, for the labels of the axes.
        ax: to draw into.

    Returns:
        the Axes; intervals that miss the truth have another colour, the title has their share.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    y, m, low, high = (array(value, "data") for value in (targets, mean, lower, upper))
    if not len(y) == len(m) == len(low) == len(high):
        raise ValueError(f"{len(y)} targets, {len(m)} means, {len(low)} and {len(high)} ends")
    missed = (y < low) | (y > high)
    ax, own = new_axes(ax, (5.4, 5.2))
    kinds = ((~missed, BLUE, "holds the truth"), (missed, VERMILLION, "misses it"))
    for chosen, colour, label in kinds:
        if chosen.any():
            around = np.maximum(np.stack([m - low, high - m])[:, chosen], 0)
            bars = ax.errorbar(
                y[chosen], m[chosen], around, fmt="o", ms=4, lw=1, color=colour, alpha=0.7
            )
            bars.set_label(label)
    ends = [min(y.min(), m.min()), max(y.max(), m.max())]
    ax.plot(ends, ends, color="0.4", ls="--", lw=1.5)
    ax.set(xlabel=f"truth [{unit}]", ylabel=f"prediction [{unit}]")
    ax.set_title(f"{100 * missed.mean():.0f} % of the intervals miss")
    ax.legend(loc="upper left", frameon=False)
    return polish(ax, own)


def plot_coverage(
    coverage: Mapping[str, Values], levels: Values, *, ax: Axes | None = None
) -> Axes:
    """Share of the truth that intervals hold, against their nominal level.

    Args:
        coverage: shares for each level, ``[L]``, by name, as
            :func:`bayesagg.diagnostics.interval_coverage` gives them.
        levels: nominal, ``[L]``, 0 to 1.
        ax: to draw into.

    Returns:
        the Axes: below the diagonal predictions are too sure of themselves.

    Raises:
        ValueError: if there is nothing to draw, or shapes differ.
    """
    if not coverage:
        raise ValueError("no coverage to draw: pass shares by name")
    nominal = array(levels, "levels")
    ax, own = new_axes(ax, (5.4, 5.2))
    ax.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1.5, label="nominal")
    for index, (name, values) in enumerate(coverage.items()):
        shares = array(values, "levels")
        if shares.shape != nominal.shape:
            raise ValueError(f"{name!r}: {len(shares)} shares for {len(nominal)} levels")
        ax.plot(nominal, shares, label=shown(name), **line_style(index, len(nominal)))
    ax.set(xlabel="nominal level of the interval [0 to 1]", xlim=(0, 1), ylim=(0, 1))
    ax.set_ylabel("share of the truth inside [0 to 1]")
    ax.legend(loc="upper left", frameon=False)
    return polish(ax, own)

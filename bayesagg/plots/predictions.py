"""Whether predicted intervals can be taken at their word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bayesagg.plots.style import BLUE, VERMILLION, Values, array, line_style, new_axes, polish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_coverage", "plot_predictions"]


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
        ImportError: if matplotlib is not installed.
        ValueError: for other shapes, or values that are not finite.
    """
    own = ax is None
    y, m, low, high = (array(value, "data") for value in (targets, mean, lower, upper))
    if not len(y) == len(m) == len(low) == len(high):
        raise ValueError(f"{len(y)} targets, {len(m)} means, {len(low)} and {len(high)} ends")
    missed = (y < low) | (y > high)
    ax = new_axes(ax, (5.4, 5.2))
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
    ax.set_xlabel(f"truth [{unit}]")
    ax.set_ylabel(f"prediction [{unit}]")
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
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw, or shapes differ.
    """
    own = ax is None
    if not coverage:
        raise ValueError("no coverage to draw: pass shares by name")
    nominal = array(levels, "levels")
    ax = new_axes(ax, (5.4, 5.2))
    ax.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1.5, label="nominal")
    for index, (name, values) in enumerate(coverage.items()):
        shares = array(values, "levels")
        if shares.shape != nominal.shape:
            raise ValueError(f"{name!r}: {len(shares)} shares for {len(nominal)} levels")
        ax.plot(nominal, shares, label=name, **line_style(index, len(nominal)))
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("nominal level of the interval [0 to 1]")
    ax.set_ylabel("share of the truth inside [0 to 1]")
    ax.legend(loc="upper left", frameon=False)
    return polish(ax, own)

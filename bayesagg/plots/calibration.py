"""Whether a classifier's probabilities can be taken at their word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from bayesagg.diagnostics import expected_calibration_error, reliability
from bayesagg.plots.style import BLUE, COLOURS, VERMILLION, Values, array, new_axes, polish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_calibration", "plot_reliability"]


def plot_reliability(
    probabilities: Values, targets: Values, *, bins: int = 15, ax: Axes | None = None
) -> Axes:
    """Reliability diagram: accuracy against confidence, with the share of the data in each bin.

    Args:
        probabilities: as of :func:`bayesagg.diagnostics.reliability`.
        targets: as of :func:`bayesagg.diagnostics.reliability`.
        bins: as of :func:`bayesagg.diagnostics.reliability`.
        ax: to draw into.

    Returns:
        the Axes: light bars are the share of the data, the line the accuracy; the title has the
        expected calibration error.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: as of :func:`bayesagg.diagnostics.reliability`.
    """
    own = ax is None
    p, y = torch.as_tensor(probabilities), torch.as_tensor(targets)
    table = reliability(p, y, bins)
    confidence, accuracy, count = (
        value.cpu().numpy() for value in (table.confidence, table.accuracy, table.count)
    )
    used = count > 0
    ax = new_axes(ax, (5.4, 5.2))
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
    ax.plot(
        confidence[used],
        accuracy[used],
        color=BLUE,
        marker="o",
        lw=2,
        label="accuracy",
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_xlabel("confidence [probability of the predicted class]")
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
        ImportError: if matplotlib is not installed.
        ValueError: if there is nothing to draw, or a score is not finite.
    """
    own = ax is None
    if not scores:
        raise ValueError("no scores to draw: pass (ECE, Brier score) by the name of the method")
    points = array([list(pair) for pair in scores.values()], "methods, 2")
    ax = new_axes(ax)
    for name, (ece, brier) in zip(scores, points, strict=True):
        chosen = name == highlight
        colour, marker = (VERMILLION, "D") if chosen else (COLOURS[0], "o")
        ax.plot(ece, brier, ls="none", marker=marker, ms=9, color=colour, label=name)
        ax.annotate(name, (ece, brier), (8, 4), textcoords="offset points", fontsize=12)
    ax.margins(0.2)
    ax.set_xlabel("expected calibration error [0 to 1, lower is better]")
    ax.set_ylabel("Brier score [0 to 2, lower is better]")
    return polish(ax, own)

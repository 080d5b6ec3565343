"""The figure of the demo: Δm of each method and the task weights over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.reporting import SINGLE_TASK, Row, spread

# From the palette of Okabe and Ito, told apart with any colour vision and in grey.
_BLUE, _ORANGE = "#0072B2", "#E69F00"


def plot_comparison(
    path: Path,
    rows: Sequence[Row],
    labels: dict[str, str],
    tasks: Sequence[str],
    *,
    without_panel: Sequence[str],
    title: str,
) -> None:
    """Draw the comparison and write it to ``path``.

    Args:
        path: File to write; its suffix chooses the format.
        rows: One per method; a method with task weights gets a panel that shows them.
        labels: Name of each method in the figure.
        tasks: Names of the tasks, length K.
        without_panel: Methods whose weights are of no interest.
        title: Title of the figure: data and size of the experiment.
    """
    weighted = [row for row in rows if row.weights[-1] and row.method not in without_panel]
    with matplotlib.rc_context({"font.size": 13, "axes.titlesize": 13}):
        figure = Figure(figsize=(5.5 + 3.2 * len(weighted), 6), layout="constrained")
        ratios = [1.5] + [1.0] * len(weighted)
        axes = figure.subplots(1, 1 + len(weighted), squeeze=False, width_ratios=ratios)[0]
        _bars(axes[0], [row for row in rows if row.method != SINGLE_TASK], labels)
        _heat_maps(figure, list(axes[1:]), weighted, labels, tasks)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def _bars(axes: Axes, rows: Sequence[Row], labels: dict[str, str]) -> None:
    """Horizontal bars of Δm, a dot per seed, the best at the top."""
    ordered = sorted(rows, key=lambda row: -float(np.mean(row.delta)))
    means = [float(np.mean(row.delta)) for row in ordered]
    refit = [row.delta_refit for row in ordered]
    colours = [_BLUE if row.method.startswith("bayesagg") else _ORANGE for row in ordered]
    axes.barh([labels[row.method] for row in ordered], means, color=colours)
    diamond: dict[str, Any] = {"marker": "D", "mfc": "white", "mec": "black", "ms": 7, "ls": "none"}
    axes.plot(refit, range(len(ordered)), label="heads refit by least squares", **diamond)
    low, high = min(0.0, *means, *refit), max(0.0, *means, *refit)
    room = 0.3 * (high - low)
    for place, row in enumerate(ordered):
        if len(row.delta) > 1:
            axes.plot(row.delta, [place] * len(row.delta), "o", color="black", ms=4)
        value, marks = means[place], (means[place], refit[place], *row.delta)
        beside = max(marks) if value >= 0 else min(marks)
        axes.annotate(
            spread(row.delta),
            (beside, place),
            xytext=(8 if value >= 0 else -8, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
        )
    axes.axvline(0, color="black", lw=1)
    axes.legend(loc="upper right", frameon=False, fontsize=11)
    axes.set_xlim(low - (room if low < 0 else 0), high + room)
    axes.set_xlabel("Δm against single-task models [%]\n(lower is better)")
    axes.spines[["top", "right"]].set_visible(False)


def _heat_maps(
    figure: Figure,
    panels: Sequence[Axes],
    rows: Sequence[Row],
    labels: dict[str, str],
    tasks: Sequence[str],
) -> None:
    """One panel per method that weighs: tasks downwards, epochs to the right, one colour scale."""
    if not rows:
        return
    grids = [np.array(row.weights).T for row in rows]
    positive = np.concatenate([grid[grid > 0] for grid in grids])
    norm = LogNorm(positive.min(), positive.max())
    image = None
    for axes, row, grid in zip(panels, rows, grids, strict=True):
        extent = (0.5, grid.shape[1] + 0.5, len(tasks) - 0.5, -0.5)
        image = axes.imshow(grid, aspect="auto", norm=norm, cmap="cividis", extent=extent)
        axes.set_title(labels[row.method])
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        axes.set_yticks(range(len(tasks)), tasks if axes is panels[0] else [""] * len(tasks))
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="share of the task in the weights")

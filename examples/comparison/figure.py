"""The figures of a comparison: Δm of each method and every task; ECE against Brier score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from examples.comparison.catalogue import SINGLE_TASK
from examples.comparison.pipeline import Outcome
from examples.comparison.report import spread
from examples.comparison.tasks import BINS, Task

# From the palette of Okabe and Ito, told apart with any colour vision and in grey.
_BLUE, _ORANGE = "#0072B2", "#E69F00"
_PANELS = 4  # of calibration; with more tasks: one, of the means over them
_MARKERS = "oDs^vPX*<>h"


def plot_comparison(
    path: Path, outcome: Outcome, labels: Mapping[str, str], tasks: Sequence[Task], title: str
) -> None:
    """Draw the comparison and write it to ``path``; its suffix chooses the format."""
    standings = outcome.standings
    order = sorted(standings, key=lambda name: mean(standings[name].delta))
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(13, 1.8 + 0.36 * len(order)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.2, 1])
        _dots(left, outcome, order)
        left.set_yticks(range(len(order)), [labels[name] for name in order])
        if order:
            _differences(figure, right, outcome, order, tasks)
        left.set_ylim(len(order) - 0.5, -0.5)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)


def _dots(axes: Axes, outcome: Outcome, order: Sequence[str]) -> None:
    """A line per method: the seeds, their mean as a bar from zero, and its value."""
    largest = 0.0
    for place, name in enumerate(order):
        delta = outcome.standings[name].delta
        colour = _BLUE if name.startswith("bayesagg") else _ORANGE
        axes.barh(place, mean(delta), color=colour, height=0.7)
        axes.plot(delta, [place] * len(delta), "o", color="black", ms=3)
        largest = max(largest, *map(abs, delta))
        axes.annotate(
            spread(delta, 1),
            (max(*delta, 0.0, mean(delta)), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    if largest > 20:  # some methods are far off: keep the others apart
        axes.set_xscale("symlog", linthresh=5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (3 if largest > 20 else 1.35))
    axes.axvline(0, color="black", lw=1)
    axes.set_xlabel("Δm against single-task models [%], lower is better")
    axes.spines[["top", "right"]].set_visible(False)


def _differences(
    figure: Figure, axes: Axes, outcome: Outcome, order: Sequence[str], tasks: Sequence[Task]
) -> None:
    """Relative difference to the single-task mean, per task; positive is worse."""
    runs = outcome.runs[SINGLE_TASK]
    single = np.array(
        [mean(run.shown[k][task.metric] for run in runs) for k, task in enumerate(tasks)]
    )
    sign = np.array([-1.0 if task.higher_is_better else 1.0 for task in tasks])
    values = np.array([outcome.standings[name].values for name in order])
    grid = 100 * sign * (values - single) / single
    limit = max(float(np.abs(grid).max()), 1e-6)
    threshold = max(limit / 100, min(limit, 1.0))
    norm = SymLogNorm(linthresh=threshold, vmin=-limit, vmax=limit)
    image = axes.imshow(grid, aspect="auto", norm=norm, cmap="RdBu_r")
    axes.set_xticks(range(len(tasks)), [task.name for task in tasks], rotation=60, ha="right")
    axes.tick_params(axis="y", length=0, labelleft=False)
    figure.colorbar(image, ax=axes, label="difference to single-task [%]\n(red: worse)")


def plot_calibration(
    path: Path, outcome: Outcome, labels: Mapping[str, str], tasks: Sequence[Task], title: str
) -> bool:
    """Draw ECE against Brier score, a point per method, and write the figure to ``path``.

    Means over the seeds, on the part that tables are of; a panel per classification task, or one of
    the means where there are more than four. A method of which a run failed is left out.

    Returns:
        Whether there is something to draw: a task of classification with one output per datum.
    """
    which = [k for k, values in enumerate(outcome.runs[SINGLE_TASK][0].test) if "ece" in values]
    done = [name for name in outcome.runs if name in (SINGLE_TASK, *outcome.standings)]
    if not which:
        return False
    panels = {tasks[k].name: [k] for k in which}
    if len(which) > _PANELS:
        panels = {f"mean over {len(which)} tasks": which}
    with matplotlib.rc_context({"font.size": 11}):
        figure = Figure(figsize=(2.5 + 4.5 * len(panels), 5), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, (name, chosen) in zip(axes, panels.items(), strict=True):
            points = {}
            for n in done:
                measured = [run.shown[k] for run in outcome.runs[n] for k in chosen]
                points[n] = [mean(m[key] for m in measured) for key in ("ece", "brier")]
            scales = (panel.set_xscale, panel.set_yscale)
            for scale, values in zip(scales, zip(*points.values(), strict=True), strict=True):
                if min(values) > 0 and max(values) > 10 * min(values):
                    scale("log")
            for i, (n, point) in enumerate(points.items()):
                style = {"marker": _MARKERS[i % len(_MARKERS)], "mec": "black", "ms": 9}
                colour = matplotlib.colormaps["tab20"](i % 20)
                panel.plot(*point, ls="none", mew=0.5, color=colour, label=labels[n], **style)
            panel.set_title(name)
            panel.set_xlabel(f"ECE, {BINS} bins (lower is better)")
            panel.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("Brier score (lower is better)")
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False, fontsize=10)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)
    return True

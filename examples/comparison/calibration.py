"""Calibration of each method: expected calibration error against Brier score (Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.comparison.catalogue import SINGLE_TASK
from examples.comparison.pipeline import Outcome
from examples.comparison.tasks import BINS, Task

# From the palette of Okabe and Ito, told apart with any colour vision; the shapes say the same.
_BLUE, _ORANGE, _BLACK = "#0072B2", "#E69F00", "#000000"
_PANELS = 4  # with more tasks: one panel, of the means over them

Points = dict[str, tuple[float, float]]  # ECE and Brier score by method


def plot_calibration(
    path: Path, outcome: Outcome, labels: Mapping[str, str], tasks: Sequence[Task], title: str
) -> bool:
    """Draw ECE against Brier score, a point per method, and write the figure to ``path``.

    Means over the seeds, on the test part; a panel per classification task. A method of which a run
    failed is left out.

    Returns:
        Whether there is something to draw: a task of classification.
    """
    panels = _panels(outcome, tasks)
    if not panels:
        return False
    count = max(len(points) for points in panels.values())
    with matplotlib.rc_context({"font.size": 11}):
        size = (6.2 * len(panels), 2.2 + 0.24 * count)
        figure = Figure(figsize=size, layout="constrained")
        for axes, (name, points) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            _draw(axes, points, labels)
            axes.set_title(name)
        figure.suptitle(title)
        figure.savefig(path, dpi=150)
    return True


def _panels(outcome: Outcome, tasks: Sequence[Task]) -> dict[str, Points]:
    """Points by title of the panel."""
    which = [k for k, task in enumerate(tasks) if task.kind != "regression"]
    done = [name for name in outcome.runs if name in (SINGLE_TASK, *outcome.standings)]
    if not which:
        return {}
    if len(which) > _PANELS:
        title = f"mean over {len(which)} tasks"
        return {title: {name: _point(outcome, name, which) for name in done}}
    return {tasks[k].name: {name: _point(outcome, name, [k]) for name in done} for k in which}


def _point(outcome: Outcome, name: str, which: Sequence[int]) -> tuple[float, float]:
    """Mean ECE and Brier score over seeds and tasks."""
    measured = [run.test[k] for run in outcome.runs[name] for k in which]
    return mean(m["ece"] for m in measured), mean(m["brier"] for m in measured)


def _draw(axes: Axes, points: Points, labels: Mapping[str, str]) -> None:
    axes.locator_params(nbins=5)  # before the scales: those of logarithms have no such setting
    both = zip(*points.values(), strict=True)
    for scale, values in zip((axes.set_xscale, axes.set_yscale), both, strict=True):
        if min(values) > 0 and max(values) > 10 * min(values):
            scale("log")
    for name, (ece, brier) in points.items():
        colour, marker = _style(name)
        axes.plot(ece, brier, marker, color=colour, mec="white", mew=0.6, ms=9, alpha=0.85)
    axes.margins(0.08)
    axes.set_xlabel(f"ECE, {BINS} bins (lower is better)")
    axes.set_ylabel("Brier score (lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    _name(axes, points, labels)


def _style(name: str) -> tuple[str, str]:
    if name == SINGLE_TASK:
        return _BLACK, "s"
    return (_BLUE, "D") if name.startswith("bayesagg") else (_ORANGE, "o")


def _name(axes: Axes, points: Points, labels: Mapping[str, str]) -> None:
    """Labels in a column beside the axes, in the order of the points, with a line to each."""
    axes.autoscale_view()
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    height = {name: float(to_axes(point)[1]) for name, point in points.items()}
    order = sorted(points, key=lambda name: (height[name], points[name][0]))
    places = spaced([height[name] for name in order], 1 / max(len(order) - 1, 1))
    for name, place in zip(order, places, strict=True):
        axes.annotate(
            labels[name],
            points[name],
            xytext=(1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            color=_BLUE if name.startswith("bayesagg") else _BLACK,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.6", "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def spaced(wanted: Sequence[float], most: float) -> list[float]:
    """Places between 0 and 1 near the wanted ones, at least ``min(most, 0.055)`` apart.

    Args:
        wanted: In rising order.
        most: The distance at which all just fit.
    """
    gap = min(most, 0.055)
    places: list[float] = []
    for value in wanted:
        places.append(max(value, places[-1] + gap if places else 0.0))
    top = 1.0
    for i in reversed(range(len(places))):  # push down what went beyond the top
        places[i] = min(places[i], top)
        top = places[i] - gap
    return places

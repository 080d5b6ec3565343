"""Tasks over training: weights, per datum too, conflict and certainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesagg.plots.style import Values, array, line_style, new_axes, polish, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_certainty", "plot_conflict", "plot_task_weights", "plot_weights"]


def plot_task_weights(
    history: Sequence[Mapping[str, Tensor]],
    *,
    steps: Sequence[float] | None = None,
    unit: str = "step",
    ax: Axes | None = None,
) -> Axes:
    """What the wrapper's ``task_weights`` were over training, and the uniform weight.

    Args:
        history: ``dict(optimizer.task_weights)``, noted at some steps; at least one.
        steps: when they were noted; 1, 2, … if not given.
        unit: of ``steps``: ``"step"`` or ``"epoch"``.
        ax: to draw into.

    Returns:
        the Axes with one line per output of every task, and a dotted one where all are equal.

    Raises:
        ValueError: if there is nothing to draw, or entries differ in their tasks.
    """
    if not history:
        raise ValueError("the history is empty: append dict(optimizer.task_weights) while training")
    if any(list(entry) != list(history[0]) for entry in history):
        raise ValueError("the entries of the history have different tasks")
    names = [
        name if len(weights) == 1 else f"{name} {output}"
        for name, weights in history[0].items()
        for output in range(len(weights))
    ]
    table = [torch.cat([weights.detach().cpu() for weights in entry.values()]) for entry in history]
    ax, own = _lines(table, names, steps, unit, ax)
    ax.axhline(1 / len(names), color="0.4", ls=(0, (1, 3)), lw=1.5, label="uniform")
    ax.set_ylabel("mean weight [share]")
    ax.set_ylim(bottom=0)
    return _legend(ax, own)


def plot_conflict(
    history: Values | Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    steps: Sequence[float] | None = None,
    unit: str = "step",
    ax: Axes | None = None,
) -> Axes:
    """Share of data and other tasks that each task's gradient points away from, over training.

    Args:
        history: of :func:`bayesagg.diagnostics.gradient_conflict`, ``[T, K]`` or a sequence of
            ``T`` results, 0 to 1.
        names: of the tasks.
        steps: when they were noted; 1, 2, … if not given.
        unit: of ``steps``.
        ax: to draw into.

    Returns:
        the Axes with one line per task, in percent.

    Raises:
        ValueError: for another shape.
    """
    table = 100 * array(history, "times, tasks")
    ax, own = _lines(table, names, steps, unit, ax)
    ax.set_ylabel("conflict with other tasks [% of pairs]")
    ax.set_ylim(0, 100)
    return _legend(ax, own)


def plot_certainty(
    history: Values | Sequence[Tensor],
    *,
    names: Sequence[str] | None = None,
    steps: Sequence[float] | None = None,
    unit: str = "step",
    ax: Axes | None = None,
) -> Axes:
    """Signal to noise ratio of each task's gradient over training, on a logarithmic axis.

    Args:
        history: of :func:`bayesagg.diagnostics.gradient_certainty`, ``[T, K]`` or a sequence of
            ``T`` results, positive.
        names: of the tasks.
        steps: when they were noted; 1, 2, … if not given.
        unit: of ``steps``.
        ax: to draw into.

    Returns:
        the Axes with one line per task, and a dotted one where gradient and noise are equal.

    Raises:
        ValueError: for another shape.
    """
    ax, own = _lines(history, names, steps, unit, ax)
    ax.axhline(1, color="0.4", ls=(0, (1, 3)), lw=1.5, label="gradient = noise")
    _plain_decades(ax)
    ax.set_ylabel("certainty, ‖E[g]‖ / sd [ratio]")
    return _legend(ax, own)


def plot_weights(
    stages: Mapping[str, Values],
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Mean weight over dimensions of every datum and task, stage beside stage (Figure 3).

    Args:
        stages: weights by the name of the stage (``"epoch 1"``), ``[N, K, d]`` as
            :func:`bayesagg.aggregation.aggregate_diagonal` returns them, or their mean over
            dimensions, ``[N, K]``. Some twenty data a stage can be told apart.
        names: of the tasks.
        ax: to draw into.

    Returns:
        the Axes with one image; stages are separated by an empty column.

    Raises:
        ValueError: if there is no stage, or they differ in the number of tasks.
    """
    if not stages:
        raise ValueError("no stage to draw: pass weights by name, {'epoch 1': weights}")
    blocks = [
        array(w, "data, tasks, dimensions").mean(2) if np.ndim(w) == 3 else array(w, "data, tasks")
        for w in stages.values()
    ]
    tasks = blocks[0].shape[1]
    if any(block.shape[1] != tasks for block in blocks):
        raise ValueError(f"stages differ in their tasks: {[block.shape[1] for block in blocks]}")
    gap = np.full((1, tasks), np.nan)
    rows = [part for block in blocks for part in (gap, block)][1:]
    image = np.concatenate(rows).T  # [K, columns]
    ax, own = new_axes(ax, (max(6.4, 2.6 * len(blocks) + 1.5), max(3.6, 1.8 + 0.32 * tasks)))
    drawn = ax.imshow(image, aspect="auto", cmap="cividis", vmin=0, interpolation="none")
    centres, start = [], 0
    for block in blocks:
        centres.append(start + (len(block) - 1) / 2)
        start += len(block) + 1
    labels = [f"{name}\n{len(block)} data" for name, block in zip(stages, blocks, strict=True)]
    ax.set_xticks(centres, labels)
    ax.set_yticks(range(tasks), [*map(str, range(tasks) if names is None else names)])
    ax.tick_params(length=0)
    ax.set_xlabel("stage of training, one column per datum")
    ax.set_ylabel("task")
    bar = ax.figure.colorbar(drawn, ax=ax)
    bar.set_label("mean weight [share]\nwhite line: uniform", size=12 if own else None)
    bar.ax.axhline(1 / tasks, color="white", lw=2)
    polish(ax, own)
    ax.spines[["left", "bottom"]].set_visible(False)
    return ax


def _lines(
    history: Values | Sequence[Any],
    names: Sequence[str] | None,
    steps: Sequence[float] | None,
    unit: str,
    ax: Axes | None,
) -> tuple[Axes, bool]:
    values = array(history, "times, tasks")
    times, tasks = values.shape
    x = np.arange(1, times + 1) if steps is None else np.asarray(steps, dtype=np.float64)
    labels = [f"task {k}" for k in range(tasks)] if names is None else list(names)
    if x.shape != (times,) or len(labels) != tasks:
        raise ValueError(
            f"{times} times and {tasks} tasks, but {len(x)} steps and {len(labels)} names"
        )
    ax, own = new_axes(ax, (7.2, max(4.4, 0.26 * tasks)))  # room for the legend beside it
    for k in range(tasks):
        ax.plot(x, values[:, k], label=shown(labels[k]), **line_style(k, times))
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel(f"{unit} of training")
    return ax, own


def _legend(ax: Axes, own: bool) -> Axes:
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return polish(ax, own)


def _plain_decades(ax: Axes) -> None:
    """A logarithmic axis with numbers as 0.5, not 5 × 10⁻¹; between decades where there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    plain = StrMethodFormatter("{x:g}")
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter(plain if high < 100 * low else NullFormatter())

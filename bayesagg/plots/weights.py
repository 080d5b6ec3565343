"""The weights of Eq. 7 per datum and task, at several stages of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bayesagg.plots.style import Values, array, new_axes, polish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_weights"]


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
        ImportError: if matplotlib is not installed.
        ValueError: if there is no stage, or they differ in the number of tasks.
    """
    own = ax is None
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
    ax = new_axes(ax, (max(6.4, 2.6 * len(blocks) + 1.5), max(3.6, 1.8 + 0.32 * tasks)))
    drawn = ax.imshow(image, aspect="auto", cmap="cividis", vmin=0, interpolation="none")
    centres, start = [], 0
    for block in blocks:
        centres.append(start + (len(block) - 1) / 2)
        start += len(block) + 1
    labels = [f"{name}\n{len(block)} data" for name, block in zip(stages, blocks, strict=True)]
    ax.set_xticks(centres, labels)
    ax.set_yticks(
        range(tasks), list(names) if names is not None else [str(k) for k in range(tasks)]
    )
    ax.tick_params(length=0)
    ax.set_xlabel("stage of training, one column per datum")
    ax.set_ylabel("task")
    bar = ax.figure.colorbar(drawn, ax=ax)
    bar.set_label("mean weight [share]\nwhite line: uniform", size=12 if own else None)
    bar.ax.axhline(1 / tasks, color="white", lw=2)
    polish(ax, own)
    ax.spines[["left", "bottom"]].set_visible(False)
    return ax

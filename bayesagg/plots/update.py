"""The update for two shared dimensions: what each task wants, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesagg.aggregation import aggregate_diagonal, aggregate_full
from bayesagg.plots.style import (
    BLUE,
    COLOURS,
    VERMILLION,
    Floats,
    Values,
    array,
    foreground,
    new_axes,
    polish,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_update"]


def plot_update(
    mean: Values,
    second: Values,
    *,
    s: float = 1.0,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Gradients of some tasks for one datum, their average and their aggregate (Figure 2).

    Shaded ellipses are one and two standard deviations of each task's gradient.

    Args:
        mean: ``E[g]`` of ``K`` tasks along two shared dimensions, ``[K, 2]``.
        second: ``Var[g]``, ``[K, 2]``, aggregated by Eq. 7, or ``Cov[g]``, ``[K, 2, 2]``, by Eq. 6.
        s: exponent of Eq. 7.
        names: of the tasks.
        ax: to draw into.

    Returns:
        the Axes; its arrows carry the labels ``"average"``, ``"aggregate"`` and the tasks' names.

    Raises:
        ValueError: for other shapes, or a variance that is not positive.
    """
    means = array(mean, "tasks, 2")
    count = len(means)
    full = np.ndim(second) == 3
    spread = array(second, "tasks, 2, 2" if full else "tasks, 2")
    if means.shape[1] != 2 or spread.shape != ((count, 2, 2) if full else (count, 2)):
        raise ValueError(
            f"expected mean [K, 2] and second [K, 2] or [K, 2, 2], got {list(means.shape)} and "
            f"{list(spread.shape)}; pick two of the shared dimensions"
        )
    covariances = spread if full else np.stack([np.diag(v) for v in spread])
    if not (np.linalg.eigvalsh(covariances) > 0).all():
        raise ValueError("every variance must be positive")
    ax, own = new_axes(ax, (6.0, 5.2))
    labels = list(names) if names is not None else [f"task {k + 1}" for k in range(count)]
    for k in range(count):
        _ellipses(ax, means[k], covariances[k], COLOURS[1 + k % (len(COLOURS) - 1)])
        _arrow(ax, means[k], foreground(), labels[k], 0.012)
        ax.annotate(labels[k], means[k], (6, 6), textcoords="offset points", fontsize=12)
    _arrow(ax, _aggregate(means, spread, s, full), BLUE, "aggregate", 0.018)
    _arrow(ax, means.mean(0), VERMILLION, "average", 0.009)  # thin and last: both can be seen
    ax.autoscale_view()
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel("gradient along dimension 1 [loss / unit of h]")
    ax.set_ylabel("gradient along dimension 2 [loss / unit of h]")
    handles, texts = ax.get_legend_handles_labels()
    shown = [i for i, text in enumerate(texts) if text in ("average", "aggregate")]
    ax.legend([handles[i] for i in shown], [texts[i] for i in shown], frameon=False)
    return polish(ax, own)


def _aggregate(means: Floats, spread: Floats, s: float, full: bool) -> Floats:
    exponent = torch.full((len(means),), float(s), dtype=torch.float64)
    mean, second = torch.tensor(means)[None], torch.tensor(spread)[None]
    if full:
        gradient = aggregate_full(mean, second, exponent, scale="mean")[0]
    else:
        gradient = aggregate_diagonal(mean, second.log(), exponent, scale="mean")[0]
    result: Floats = gradient[0].numpy()
    return result


def _ellipses(ax: Axes, centre: Floats, covariance: Floats, colour: str) -> None:
    """One and two standard deviations, darker inside."""
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for radius in (2.0, 1.0):
        x, y = centre[:, None] + radius * np.linalg.cholesky(covariance) @ circle
        ax.fill(x, y, color=colour, alpha=0.25, lw=0)
        ax.plot(x, y, color=colour, lw=1.5)


def _arrow(ax: Axes, tip: Floats, colour: Any, label: str, width: float) -> None:
    ax.quiver(
        *(0.0, 0.0, *tip),
        angles="xy",
        scale_units="xy",
        scale=1,
        width=width,
        color=colour,
        label=label,
        zorder=3,
    )
    ax.update_datalim([(0.0, 0.0), (float(tip[0]), float(tip[1]))])

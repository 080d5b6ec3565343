"""What all pictures share: colours, a new figure, and values as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "COLOURS",
    "VERMILLION",
    "Values",
    "array",
    "foreground",
    "line_style",
    "new_axes",
    "polish",
    "shown",
]

Values = Tensor | npt.ArrayLike
Floats = npt.NDArray[np.float64]

# Okabe and Ito without yellow, which is too light for lines on white.
BLUE, VERMILLION = "#0072B2", "#D55E00"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILLION, "#000000")  # last: text
_STYLES: tuple[tuple[str, str], ...] = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
_FONT = 13  # points; legible where a figure of 6.4 inches is shown at half its size


def new_axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.4)) -> tuple[Axes, bool]:
    """The given Axes, or those of a new figure of that size in inches; whether it is new."""
    if ax is not None:
        return ax, False
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "bayesagg.plots needs matplotlib, which is not installed: "
            "pip install 'bayesagg[plots]', or pip install matplotlib."
        ) from error
    return pyplot.subplots(figsize=size, layout="constrained")[1], True


def polish(ax: Axes, own: bool) -> Axes:
    """Thin out the frame; in a figure of our ``own`` also set the sizes of the text."""
    ax.spines[["top", "right"]].set_visible(False)
    if own:
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
            text.set_fontsize(_FONT)
        ax.tick_params(labelsize=_FONT - 1)
        legend = ax.get_legend()
        if legend is not None:
            for text in legend.get_texts():
                text.set_fontsize(_FONT - 1)
    return ax


def foreground() -> Any:
    """The colour of text: black, or what can be seen in a dark style."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def shown(name: str) -> str:
    """A name for the legend, which leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def line_style(index: int, points: int) -> dict[str, Any]:
    """Colour and dashes of line ``index``: 28 that differ; with markers where points are few."""
    dashes, marker = _STYLES[index // len(COLOURS) % len(_STYLES)]
    colour = (*COLOURS[:-1], foreground())[index % len(COLOURS)]
    style: dict[str, Any] = {"color": colour, "linestyle": dashes, "lw": 2}
    return {**style, "marker": marker, "ms": 6} if points <= 30 else style


def array(values: Values | Sequence[Any], shape: str) -> Floats:
    """Finite float64 values on the CPU, of as many dimensions as ``shape`` has names.

    Raises:
        ValueError: for another number of dimensions, no values, or one that is not finite.
    """
    if isinstance(values, Sequence) and values and isinstance(values[0], Tensor):
        values = torch.stack([torch.as_tensor(value) for value in values])
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != len(shape.split(",")) or result.size == 0:
        one = "; pass one output, [:, 0]" if "," not in shape and result.ndim == 2 else ""
        raise ValueError(f"expected values of shape [{shape}], got {list(result.shape)}{one}")
    if not np.isfinite(result).all():
        raise ValueError(f"the values [{shape}] have entries that are not finite: leave them out")
    return result

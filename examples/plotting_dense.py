"""The figure of the dense example: scenes, their labels and what each method makes of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from examples.scenes import CLASSES, IGNORED, Scenes

# From the palette of Okabe and Ito; pixels without a label are white.
_COLOURS = ListedColormap(["#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7"])


def plot_scenes(
    path: Path, scenes: Scenes, predictions: dict[str, tuple[Tensor, Tensor]], count: int
) -> None:
    """Draw the first ``count`` scenes in rows: image, classes and depth, labels first.

    Args:
        path: File to write; its suffix chooses the format.
        scenes: With their labels.
        predictions: By name of the method, classes ``[N, 64, 64]`` and depth ``[N, 1, 64, 64]``.
        count: Scenes to show.
    """
    count = min(count, len(scenes))
    labels = {"labels": (scenes.classes, scenes.depth), **predictions}
    with matplotlib.rc_context({"font.size": 11}):
        columns = 1 + 2 * len(labels)
        figure = Figure(figsize=(1.9 * columns, 2.0 * count + 0.8), layout="constrained")
        axes = figure.subplots(count, columns, squeeze=False)
        image = None
        for row in range(count):
            _show(axes[row, 0], "scene" if row == 0 else "")
            axes[row, 0].imshow(scenes.images[row].permute(1, 2, 0).clamp(0, 1).numpy())
            for i, (name, (classes, depth)) in enumerate(labels.items()):
                left, right = axes[row, 1 + i], axes[row, 1 + len(labels) + i]
                _show(left, f"classes:\n{name}" if row == 0 else "")
                found = classes[row].double().masked_fill(classes[row] == IGNORED, float("nan"))
                left.imshow(
                    found.numpy(), cmap=_COLOURS, vmin=-0.5, vmax=4.5, interpolation="nearest"
                )
                _show(right, f"depth:\n{name}" if row == 0 else "")
                image = right.imshow(depth[row, 0].numpy(), cmap="cividis", vmin=0, vmax=1)
        if image is not None:
            figure.colorbar(image, ax=axes[:, -1], label="depth (0: near)")
        patches = [Patch(color=_COLOURS(i), label=label) for i, label in enumerate(CLASSES)]
        figure.legend(
            handles=patches, loc="outside lower center", ncols=len(CLASSES), frameon=False
        )
        figure.savefig(path, dpi=120)


def _show(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title)

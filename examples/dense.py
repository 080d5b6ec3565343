"""Segmentation and depth of synthetic scenes, 64×64: ``python -m examples.dense``.

A small convolutional network with two 1×1 heads is trained on scenes of ``data/scenes.py`` by
linear scalarization and by BayesAgg. Prints the mean intersection over union, the error of the
depth and the time of a step, and draws the first test scenes. Pixels without a label (borders of
objects, holes of the depth sensor) are left out of the losses; nothing else has to be said of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from bayesagg import BayesAggWrapper, MulticlassHead, RegressionHead
from examples.arguments import Parser
from examples.data.scenes import CLASSES, IGNORED, Scenes, make_scenes
from examples.image_models import block

METHODS = "linear scalarization", "BayesAgg"


class Encoder(nn.Module):
    """Images ``[B, 3, 64, 64]`` to ``[B, width, 64, 64]``: down to an eighth and up again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = block(3, width)
        self.middle = block(width, 2 * width, 2)
        self.coarse = nn.Sequential(
            *(block(2 * width, 2 * width, stride) for stride in (2, 1, 2, 1)),
            nn.Upsample(scale_factor=2),
        )
        self.up = nn.Upsample(scale_factor=2)
        self.to_middle, self.to_fine = block(4 * width, width), block(2 * width, width)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        middle = self.middle(fine)
        up = self.to_middle(torch.cat([self.up(self.coarse(middle)), middle], dim=1))
        return self.to_fine(torch.cat([self.up(up), fine], dim=1))


class SceneNet(nn.Module):
    """Shared encoder, and a 1×1 convolution per task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.classes = nn.Conv2d(width, len(CLASSES), 1)
        self.depth = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        h = self.encoder(images)
        return {"classes": self.classes(h), "depth": self.depth(h)}


def losses_of(out: dict[str, Tensor], scenes: Scenes) -> dict[str, Tensor]:
    """Cross-entropy and squared error over the pixels that have a label."""
    seen = ~scenes.depth.isnan()
    return {
        "classes": F.cross_entropy(out["classes"], scenes.classes, ignore_index=IGNORED),
        "depth": F.mse_loss(out["depth"][seen], scenes.depth[seen]),
    }


def train(method: str, scenes: Scenes, args: argparse.Namespace) -> tuple[SceneNet, float]:
    """A network, the same at first for all methods, and the median time of a step in ms."""
    torch.manual_seed(args.seed)
    net = SceneNet(args.width)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    if method == "BayesAgg":
        heads = {"classes": MulticlassHead(net.classes), "depth": RegressionHead(net.depth)}
        optimizer = BayesAggWrapper(optimizer, net.encoder, heads)
    seconds = []
    for _ in range(args.epochs):
        for rows in torch.randperm(len(scenes)).split(args.batch):
            start = time.perf_counter()
            losses = losses_of(net(scenes[rows].images), scenes[rows])
            optimizer.zero_grad()
            if isinstance(optimizer, BayesAggWrapper):
                optimizer.step(losses)
            else:
                sum(losses.values()).backward()
                optimizer.step()
            seconds.append(time.perf_counter() - start)
    return net.eval(), 1e3 * median(seconds)


@torch.no_grad()
def predict(net: SceneNet, scenes: Scenes) -> Scenes:
    """The scenes with predicted classes and depth."""
    out = [net(images) for images in scenes.images.split(16)]
    classes, depth = (torch.cat([part[name] for part in out]) for name in ("classes", "depth"))
    return Scenes(scenes.images, classes.argmax(1), depth)


def draw(path: Path, shown: dict[str, Scenes], count: int = 4) -> None:
    """Images, and classes and depth of the labels and of every method."""
    figure = Figure(figsize=(2 * (1 + 2 * len(shown)), 2.1 * count), layout="constrained")
    axes = figure.subplots(count, 1 + 2 * len(shown), squeeze=False)
    for i, (name, scenes) in enumerate(shown.items()):
        for row in range(count):
            classes = scenes.classes[row].double().where(scenes.classes[row] != IGNORED, torch.nan)
            axes[row, 0].imshow(scenes.images[row].permute(1, 2, 0).clamp(0, 1).numpy())
            axes[row, 1 + i].imshow(
                classes.numpy(), cmap="tab10", vmin=0, vmax=9, interpolation="nearest"
            )
            axes[row, 1 + len(shown) + i].imshow(scenes.depth[row, 0].numpy(), vmin=0, vmax=1)
        axes[0, 1 + i].set_title(f"classes:\n{name}", fontsize=10)
        axes[0, 1 + len(shown) + i].set_title(f"depth:\n{name}", fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = Parser("dense", __doc__)
    numbers = {"scenes": 128, "test-scenes": 48, "epochs": 10, "batch": 8, "width": 48, "seed": 0}
    for name, default in {**numbers, "out": Path("output/dense.png")}.items():
        parser.option(name, default)
    args = parser.parse_args(argv)
    scenes = make_scenes(args.scenes, seed=args.seed)
    test = make_scenes(args.test_scenes, seed=args.seed + 1)
    shown = {"labels": test}
    for method in METHODS:
        net, milliseconds = train(method, scenes, args)
        shown[method] = found = predict(net, test)
        error = (found.depth - test.depth).abs().nanmean()  # of the pixels that have a depth
        iou = multiclass_jaccard_index(
            found.classes, test.classes, len(CLASSES), ignore_index=IGNORED
        )
        print(f"{method:22} mIoU {iou:.3f}  depth error {error:.4f}  {milliseconds:.0f} ms a step")
    draw(args.out, shown, count=min(4, args.test_scenes))
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()

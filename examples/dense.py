"""Segmentation and depth of synthetic scenes, 64×64: ``python -m examples.dense``.

A small convolutional network with two 1×1 heads is trained on the same scenes by linear
scalarization and by BayesAgg.

In the scenes objects of four kinds stand at random distances, solids in front of a receding floor.
The nearer of two hides the other, size falls with distance, a haze takes the colours away, and
every kind has a paint that it tends to wear: image, classes and depth hang together.

Prints the mean intersection over union, the error of the depth and the time of a step, and draws
the first test scenes. Pixels without a label (borders of objects, holes of the depth sensor) are
left out of the losses; nothing else has to be said about them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_jaccard_index

from bayesagg import BayesAggWrapper, MulticlassHead, RegressionHead
from examples.image_models import block

METHODS = ("linear scalarization", "BayesAgg")
CLASSES = ("floor", "disc", "square", "triangle", "ring")
SIZE = 64
IGNORED = -100
_MAX_OBJECTS = 6
_HAZE = torch.tensor([0.75, 0.8, 0.85])
# What each kind tends to be painted with, without floor.
_PAINTS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.1], [0.1, 0.7, 0.3]])


@dataclass(frozen=True)
class Scenes:
    """Images with two maps of labels."""

    images: Tensor  # ``[N, 3, 64, 64]``, colours in 0 to 1 with noise
    # ``[N, 64, 64]`` indices into :data:`CLASSES`; ``IGNORED`` at the objects' borders
    classes: Tensor
    depth: Tensor  # ``[N, 1, 64, 64]``, 0 (near) to 1 (far); NaN in the holes of the sensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(self.images[index], self.classes[index], self.depth[index])


def make_scenes(count: int, *, seed: int) -> Scenes:
    """``count`` scenes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [_draw(generator) for _ in range(count)]
    return Scenes(*(torch.stack(part) for part in zip(*scenes, strict=True)))


def _draw(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One scene, painted from the back to the front."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    tilt = 0.3 * torch.rand((), generator=generator)
    depth = 1.0 - (0.5 + tilt) * y / SIZE
    colour = (0.3 + 0.4 * torch.rand(3, 1, 1, generator=generator)).expand(3, SIZE, SIZE).clone()
    classes = torch.zeros(SIZE, SIZE, dtype=torch.long)
    border = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    count = int(torch.randint(2, _MAX_OBJECTS + 1, (), generator=generator))
    distances = torch.rand(count, generator=generator).sort(descending=True).values
    for distance in distances.tolist():
        kind = int(torch.randint(1, len(CLASSES), (), generator=generator))
        centre = torch.rand(2, generator=generator) * SIZE
        radius = 16 - 10 * distance
        u, v = (x - centre[0]) / radius, (y - centre[1]) / radius
        inside, outer = _contains(kind, u, v), _contains(kind, u / 1.12, v / 1.12)
        border = (border & ~inside) | (outer & ~inside)
        classes = torch.where(inside, kind, classes)
        depth = torch.where(inside, 0.1 + 0.7 * distance, depth)
        paint = 0.5 * _PAINTS[kind - 1] + 0.5 * torch.rand(3, generator=generator)
        shade = (1 - 0.3 * v).clamp(0.4, 1.3)
        colour = torch.where(inside, paint.view(3, 1, 1) * shade, colour)
    haze = (0.8 * depth)[None]
    image = colour * (1 - haze) + _HAZE.view(3, 1, 1) * haze
    image = image + 0.05 * torch.randn(image.shape, generator=generator)
    classes = torch.where(border, IGNORED, classes)
    return image, classes, torch.where(_hole(x, y, generator), torch.nan, depth)[None]


def _contains(kind: int, u: Tensor, v: Tensor) -> Tensor:
    """Which points lie in an object of radius one."""
    r2 = u.square() + v.square()
    if kind == 1:
        return r2 < 1
    if kind == 2:
        return (u.abs() < 0.85) & (v.abs() < 0.85)
    if kind == 3:
        return (v < 0.8) & (v > 2 * u.abs() - 1)
    return (r2 < 1) & (r2 > 0.3)


def _hole(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """A disc in which the depth sensor sees nothing."""
    centre = torch.rand(2, generator=generator) * SIZE
    radius = 4 + 8 * torch.rand((), generator=generator)
    return (x - centre[0]).square() + (y - centre[1]).square() < radius.square()


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
    out = [net(part) for part in scenes.images.split(16)]
    classes = torch.cat([part["classes"].argmax(1) for part in out])
    return Scenes(scenes.images, classes, torch.cat([part["depth"] for part in out]))


def depth_error(predicted: Tensor, truth: Tensor) -> float:
    """Mean absolute error of the labelled pixels."""
    seen = ~truth.isnan()
    return float((predicted[seen] - truth[seen]).abs().mean())


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
    parser = argparse.ArgumentParser(prog="python -m examples.dense", description=__doc__)
    for name, default, text in (
        ("scenes", 128, "training scenes"),
        ("test-scenes", 48, "test scenes"),
        ("epochs", 10, "epochs"),
        ("batch", 8, "scenes in a batch"),
        ("width", 48, "channels of the shared representation"),
        ("seed", 0, "of scenes, networks and order"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--out", type=Path, default=Path("output/dense.png"), help="the figure")
    args = parser.parse_args(argv)
    scenes = make_scenes(args.scenes, seed=args.seed)
    test = make_scenes(args.test_scenes, seed=args.seed + 1)
    shown = {"labels": test}
    for method in METHODS:
        net, milliseconds = train(method, scenes, args)
        shown[method] = found = predict(net, test)
        error = depth_error(found.depth, test.depth)
        iou = multiclass_jaccard_index(
            found.classes, test.classes, len(CLASSES), ignore_index=IGNORED
        )
        print(f"{method:22} mIoU {iou:.3f}  depth error {error:.4f}  {milliseconds:.0f} ms a step")
    draw(args.out, shown, count=min(4, args.test_scenes))
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()

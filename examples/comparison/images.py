"""What the image benchmarks have in common: parts, augmented alike for all methods, and models."""

from __future__ import annotations

import os
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import examples.data
from examples import image_models
from examples.comparison.benchmark import Benchmark
from examples.comparison.networks import SeparateNets, TaskNet
from examples.comparison.tasks import Task
from examples.data import DataFileError
from examples.training import Part

Transform = Callable[[Image.Image], Tensor]

_THREADS = min(8, os.cpu_count() or 1)  # decoding releases the interpreter lock
# What Pillow raises for files that are cut short or are no images.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
Backbone = Callable[[], nn.Module]
CODE = (examples.data, image_models, sys.modules[__name__])  # that results of images depend on


@dataclass(frozen=True)
class StoredImages:
    """Images that fit into memory, normalised when a batch is taken."""

    x: Tensor  # images, shape ``(n, C, H, W)``, uint8
    y: Tensor  # targets, shape ``(n, K)``
    mean: tuple[float, ...]  # mean of each channel of images in [0, 1]
    std: tuple[float, ...]  # standard deviation of each
    chunk: int = 500  # images at once in evaluation

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images, float32, and targets of the given rows."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (self.x[rows] / 255 - mean) / std, self.y[rows]


@dataclass(frozen=True)
class ImageFiles:
    """Images in files.

    The random numbers of an augmentation follow from the rows of the batch and their order: they
    differ from epoch to epoch and from seed to seed as the batches do, are the same for all methods
    of a comparison, and leave the global random state alone.
    """

    files: Sequence[Path]  # of all images of the data set
    rows: Tensor  # places of the images of this part, shape ``(n,)``
    y: Tensor  # their targets, shape ``(n, K)``
    transform: Transform  # makes the input of the network from an image
    size: int  # pixels of the square that images are scaled to
    mode: str = "RGB"  # Pillow's name of their channels; ``L`` for one of grey
    chunk: int = 64  # images at once in evaluation

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, place: int) -> Image.Image:
        """An image of three channels, scaled by area-aware bilinear interpolation.

        Raises:
            DataFileError: If the file cannot be read as an image; the message names it.
        """
        path, square = self.files[place], (self.size, self.size)
        try:
            with Image.open(path) as image:
                image = image.convert(self.mode).convert("RGB")
            return image.resize(square, Image.Resampling.BILINEAR)
        except _UNREADABLE as error:
            raise DataFileError(
                f"{path} cannot be read as an image ({type(error).__name__}: {error}); "
                "extract or download it again. Finished runs are kept"
            ) from error

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of the given rows; see :meth:`read`."""
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(self.read, self.rows[rows].tolist()))
        with _seeded(zlib.crc32(rows.numpy().tobytes())):
            x = torch.stack([self.transform(image) for image in images])
        return x, self.y[rows]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Both generators that timm draws from, which afterwards are as they were."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


class RecomputedNets(SeparateNets):
    """Separate networks of which only one's activations are in memory at once.

    They are computed again in the backward pass, which costs a third more time.
    """

    def output(self, network: nn.Module, x: Any) -> Tensor:
        """As of the base, through a checkpoint in training."""
        if not torch.is_grad_enabled():
            return super().output(network, x)
        return checkpoint(
            super().output,
            network,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in these networks is random
            context_fn=lambda: (nullcontext(), _kept_statistics(network)),
        )


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalisation alone: a batch counts once."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def image_benchmark(
    tasks: Sequence[Task],
    parts: tuple[Part, Part, Part],
    backbone: Backbone,
    width: int,
    *,
    network: str,
    version: dict[str, Any],
    head: Callable[[int, int], nn.Module] = nn.Linear,
    **own: Any,
) -> Benchmark:
    """Put a benchmark of images together.

    Args:
        tasks: Tasks, sorted by kind.
        parts: Training, validation and test part.
        backbone: Makes a new backbone.
        width: Dimensions of its output.
        network: What it is.
        version: What identifies the data besides the sizes of the parts.
        head: As of :class:`TaskNet`.
        own: Other fields of the :class:`Benchmark`; without a scale no target was divided.
    """

    def net(own: Sequence[Task]) -> TaskNet:
        return TaskNet(backbone(), width, own, head)

    return Benchmark(
        tuple(tasks),
        *parts,
        model=partial(net, tasks),
        single_task=partial(RecomputedNets.of, tasks, net),
        network=f"{network}, linear heads",
        version={**version, "parts": [len(part) for part in parts]},
        **{"scale": torch.ones(len(tasks)), **own},
    )

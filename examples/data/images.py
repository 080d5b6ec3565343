"""Images as parts of a benchmark: read when a batch asks for them, augmented the same for all."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from examples.data.folder import DataFileError

Pixels = npt.NDArray[np.uint8]
Transform = Callable[[Tensor], Tensor]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_THREADS = min(8, os.cpu_count() or 1)  # decoding releases the interpreter lock
# What Pillow raises for files that are cut short or are no images.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class StoredImages:
    """Images that fit into memory, normalised when a batch is taken."""

    x: Tensor  # images, shape ``(n, C, H, W)``, uint8
    y: Tensor  # targets, shape ``(n, K)``
    mean: tuple[float, ...]  # mean of each channel of images in [0, 1]
    std: tuple[float, ...]  # standard deviation of each
    chunk: int = 500  # images at once in evaluation

    def __len__(self) -> int:
        """Number of images."""
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

    # Reads an image by its place in the data set: shape ``(C, H, W)``, uint8, all of a size
    read: Callable[[int], Tensor]
    rows: Tensor  # places of the images of this part, shape ``(n,)``
    y: Tensor  # their targets, shape ``(n, K)``
    transform: Transform  # makes the input of the network from an image
    chunk: int = 64  # images at once in evaluation

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of the given rows.

        Raises:
            DataFileError: If a file cannot be read as an image; the message names it.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(self.read, self.rows[rows].tolist()))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(zlib.crc32(rows.numpy().tobytes()))
            x = torch.stack([self.transform(image) for image in images])
        return x, self.y[rows]


def read_pixels(path: Path, mode: str) -> Pixels:
    """Decode an image file with Pillow.

    Args:
        path: The file.
        mode: Pillow's name of the channels: ``"RGB"``, or ``"L"`` for one of grey.

    Returns:
        Shape ``(H, W, 3)`` or ``(H, W)``.

    Raises:
        DataFileError: If it cannot be read as an image.
    """
    with _readable(path), Image.open(path) as image:
        return np.asarray(image.convert(mode))


def verify(path: Path) -> None:
    """Check an image file (of a PNG, every checksum) without decoding it.

    Raises:
        DataFileError: If it is not what it should be.
    """
    with _readable(path), Image.open(path) as image:
        image.verify()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise DataFileError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}); "
            "extract or download it again. Finished runs are kept"
        ) from error


def resized(pixels: Pixels, size: int) -> Tensor:
    """Resize to a square of ``size`` pixels by area-aware bilinear interpolation.

    Returns:
        Shape ``(C, size, size)``, uint8; an image of one channel gets three equal ones.
    """
    image = Image.fromarray(pixels)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    channels = torch.from_numpy(np.array(image))
    return channels.expand(3, -1, -1) if channels.ndim == 2 else channels.permute(2, 0, 1)


def torchvision_transforms() -> Any:
    """Module ``torchvision.transforms.v2``.

    Raises:
        DataUnavailableError: If torchvision is not installed.
    """
    from examples.image_models import torchvision

    return torchvision("transforms.v2")


def compose(v2: Any, steps: Sequence[Transform], *, normalise: bool, last: Any = None) -> Transform:
    """Steps on uint8 images, conversion to [0, 1], ImageNet's normalisation, a last step."""
    every = [*steps, v2.ToDtype(torch.float32, scale=True)]
    if normalise:
        every.append(v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    composed: Transform = v2.Compose([*every, *([] if last is None else [last])])
    return composed

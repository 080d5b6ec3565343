"""Images as parts of a benchmark: read when a batch asks for them, augmented the same for all."""

from __future__ import annotations

import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.data.folder import DataFileError

Transform = Callable[[Image.Image], Tensor]

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

    files: Sequence[Path]  # of all images of the data set
    rows: Tensor  # places of the images of this part, shape ``(n,)``
    y: Tensor  # their targets, shape ``(n, K)``
    transform: Transform  # makes the input of the network from an image
    size: int  # pixels of the square that images are scaled to
    mode: str = "RGB"  # Pillow's name of their channels; ``L`` for one of grey
    chunk: int = 64  # images at once in evaluation

    def __len__(self) -> int:
        """Number of images."""
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

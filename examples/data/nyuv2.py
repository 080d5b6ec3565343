"""NYUv2 as preprocessed for MTAN: images of rooms with classes, depth and surface normals."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data import DataUnavailableError
from examples.data.folder import DataFileError, data_folder, require

FOLDER, PARTS = "nyuv2", ("train", "val")
SIZE = 288, 384
MAPS = {"image": (*SIZE, 3), "label": SIZE, "depth": (*SIZE, 1), "normal": (*SIZE, 3)}
CLASSES = 13
LAYOUT = (
    "NYUv2 as preprocessed for MTAN is downloaded by the link on https://github.com/lorenmt/mtan; "
    f"its folders {PARTS[0]}/ and {PARTS[1]}/, with {', '.join(MAPS)} in each and files 0.npy, "
    f"1.npy, … in these, belong into {FOLDER}/ in the data folder."
)
_SCALES = (1.0, 1.2, 1.5)  # of the augmentation of MTAN's code


@dataclass(frozen=True)
class Scenes:
    """Scenes of a part, read when a batch asks for them.

    The random numbers of the augmentation follow from the rows of the batch and their order.
    """

    folder: Path  # that of the part
    places: Tensor  # numbers of the files, shape ``(n,)``
    augment: bool = False  # random crops scaled up by 1, 1.2 or 1.5, and flips
    chunk: int = 2  # scenes at once in evaluation

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.places)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images, ``(B, 3, 288, 384)``, and targets, ``(B, 5, 288, 384)``.

        Targets are the class from 0 to 12, depth in metres and a unit normal; NaN where not known.

        Raises:
            DataFileError: If a file is not what it should be; the message names it.
        """
        x, y = zip(*(read(self.folder, int(place)) for place in self.places[rows]), strict=True)
        if self.augment:
            generator = torch.Generator().manual_seed(zlib.crc32(rows.numpy().tobytes()))
            x, y = zip(*(changed(*pair, generator) for pair in zip(x, y, strict=True)), strict=True)
        return torch.stack(x), torch.stack(y)


def part(name: str) -> tuple[Path, int]:
    """Folder of a part, and the number of its scenes.

    Raises:
        DataUnavailableError: If a file is not in the data folder.
    """
    folder = data_folder(FOLDER) / name
    require(folder, MAPS, LAYOUT)
    count = sum(1 for _ in (folder / "image").glob("*.npy"))
    if count == 0:
        raise DataUnavailableError(f"{folder / 'image'} has no files. {LAYOUT}")
    for kind in MAPS:
        require(folder / kind, [f"{place}.npy" for place in range(count)], LAYOUT)
    return folder, count


def read(folder: Path, place: int) -> tuple[Tensor, Tensor]:
    """Image, ``(3, 288, 384)``, and targets, ``(5, 288, 384)``, of a scene."""
    image, label, depth, normal = (
        _array(folder / kind / f"{place}.npy", shape) for kind, shape in MAPS.items()
    )
    if not (label.frac().eq(0) & (label >= -1) & (label < CLASSES)).all():
        raise DataFileError(
            f"{folder / 'label' / f'{place}.npy'}: labels should be -1 to {CLASSES - 1}; download "
            "it again"
        )
    label = label.where(label >= 0, torch.nan)[None]
    depth = depth.where(depth > 0, torch.nan)
    normal = F.normalize(normal, dim=0).where(normal.ne(0).any(0), torch.nan)
    return image, torch.cat([label, depth, normal])


def _array(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An array, float32, channels first."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataFileError(
            f"{path} cannot be read as an array ({error}); download it again"
        ) from error
    if found.shape != shape or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise DataFileError(
            f"{path}: {found.dtype} of shape {found.shape}; it should hold finite numbers of shape "
            f"{shape}, as MTAN's release does. Download it again"
        )
    array = torch.from_numpy(found.astype(np.float32))
    return array.movedim(-1, 0) if array.dim() == 3 else array


def changed(image: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random crop scaled up to the whole, mirrored or not: a crop at 1.2 is as much nearer."""
    scale = _SCALES[int(torch.randint(len(_SCALES), (), generator=generator))]
    corner = []
    for side in SIZE:
        length = int(side / scale)
        start = int(torch.randint(side - length + 1, (), generator=generator))
        corner.append(slice(start, start + length))
    window = (None, slice(None), *corner)
    x = F.interpolate(image[window], SIZE, mode="bilinear", align_corners=True)[0]
    y = F.interpolate(targets[window], SIZE)[0]
    y[1] /= scale
    if torch.rand((), generator=generator) < 0.5:
        x, y = x.flip(-1), y.flip(-1)
        y[2] = -y[2]  # the normal's part along the width
    return x, y

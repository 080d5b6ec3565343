"""CelebA: aligned faces with 40 binary attributes, and the official partition."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from examples.data.folder import DataFileError, data_folder, require

FOLDER, IMAGES = "celeba", "img_align_celeba"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
LAYOUT = (
    "CelebA is downloaded from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or by "
    "torchvision.datasets.CelebA(root, download=True); "
    f"{ATTRIBUTES}, {PARTITION} and the folder {IMAGES}/ with its 202,599 images belong into "
    f"{FOLDER}/ in the data folder."
)
_COUNT = 40  # attributes


class Faces(NamedTuple):
    """Files and names of the attributes; attributes, ``(n, 40)``, and part, ``(n,)``, of each.

    An attribute is 0 or 1; the parts are 0 for training, 1 for validation and 2 for test.
    """

    files: list[Path]
    names: list[str]
    targets: Tensor
    parts: Tensor


def read() -> Faces:
    """Read both lists.

    Raises:
        DataUnavailableError: If a file, or an image of the lists, is not in the data folder.
        DataFileError: If a list is not what it should be.
    """
    folder = data_folder(FOLDER)
    require(folder, (ATTRIBUTES, PARTITION, IMAGES), LAYOUT)
    # The first line is the number of images, the second has no name for their column.
    table = _table(folder / ATTRIBUTES, skiprows=1)
    if table.shape[1] != _COUNT or not table.isin((-1, 1)).all(axis=None):
        raise _error(folder / ATTRIBUTES, f"each image should have {_COUNT} values of -1 or 1")
    parts = _table(folder / PARTITION, header=None, index_col=0)
    if not parts.index.equals(table.index):
        raise _error(folder / PARTITION, f"its images are not those of {ATTRIBUTES}, in order")
    if parts.shape[1] != 1 or set(parts[1]) != {0, 1, 2}:
        raise _error(folder / PARTITION, "each part should be 0, 1 or 2, and none empty")
    require(folder / IMAGES, table.index, LAYOUT)
    return Faces(
        [folder / IMAGES / name for name in table.index],
        list(table.columns),
        torch.from_numpy((table.to_numpy() == 1).astype("float32")),
        torch.tensor(parts[1].to_numpy()),
    )


def _table(path: Path, **settings: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(path, sep=r"\s+", **settings)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise _error(path, f"it cannot be read as a table ({error})") from error


def _error(path: Path, what: str) -> DataFileError:
    return DataFileError(f"{path}: {what}; extract or download it again")

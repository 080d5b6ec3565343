"""CelebA: 40 binary attributes of a face, by the protocol of FAMO (Liu et al., 2023)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.comparison.benchmark import Benchmark, Source
from examples.comparison.images import CODE, ImageFiles, image_benchmark
from examples.comparison.tasks import Task
from examples.data import DataFileError, data_folder, listing_digest, read_table, require
from examples.image_models import nine_layers, timm
from examples.training import TrainSettings

FOLDER, IMAGES = "celeba", "img_align_celeba"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
LAYOUT = (
    "CelebA is downloaded from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, or by "
    "torchvision.datasets.CelebA(root, download=True); "
    f"{ATTRIBUTES}, {PARTITION} and the folder {IMAGES}/ with its 202,599 images belong into "
    f"{FOLDER}/ in the data folder."
)
_COUNT = 40  # attributes
_SIZE = 64  # pixels
_WIDTHS = (64, 128, 256, 512)


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
    table = read_table(folder / ATTRIBUTES, sep=r"\s+", skiprows=1)
    if table.shape[1] != _COUNT or not table.isin((-1, 1)).all(axis=None):
        raise _error(folder / ATTRIBUTES, f"each image should have {_COUNT} values of -1 or 1")
    parts = read_table(folder / PARTITION, sep=r"\s+", header=None, index_col=0)
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


def _error(path: Path, what: str) -> DataFileError:
    return DataFileError(f"{path}: {what}; extract or download it again")


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the lists; the parts are the official ones. Images are read when needed, to 64×64."""
    faces = read()
    scaled = timm("data").create_transform(
        _SIZE, is_training=False, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3
    )

    def part(number: int, most: int | None = None) -> ImageFiles:
        rows: Tensor = (faces.parts == number).nonzero()[:most, 0]
        return ImageFiles(faces.files, rows, faces.targets[rows], scaled, _SIZE)

    return image_benchmark(
        [Task(name, "binary", "f1") for name in faces.names],
        (part(0, max_train), part(1), part(2)),
        partial(nine_layers, _WIDTHS),
        _WIDTHS[-1],
        network="CNN of nine layers, random initialisation",
        version={"files": listing_digest(faces.files)},
    )


SOURCE = Source(
    title="CelebA",
    load=load,
    settings=TrainSettings(epochs=15, batch_size=256),
    preset="chestxray14",
    paper=TrainSettings(
        epochs=15, batch_size=256, learning_rate=3e-4, schedule="constant", selection="best"
    ),
    code=CODE,
)

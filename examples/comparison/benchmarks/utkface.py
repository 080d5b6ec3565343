"""UTKFace: age (regression), gender (binary) and ethnicity (five classes) from a face."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import CODE, ImageFiles, Transform, image_benchmark
from examples.comparison.tasks import Task
from examples.data import DataFileError, DataUnavailableError, data_folder, listing_digest, require
from examples.image_models import resnet, timm
from examples.training import TrainSettings

FOLDER = "UTKFace"
LAYOUT = (
    "UTKFace, aligned and cropped faces (UTKFace.tar.gz, about 100 MB), is downloaded from "
    "https://susanqq.github.io/UTKFace/; its 23,708 images, named "
    f"[age]_[gender]_[race]_[date].jpg.chip.jpg, belong into {FOLDER}/ in the data folder."
)
_SUFFIXES = {".jpg", ".jpeg", ".png"}
# Some names have two underscores, or a blank before the ending.
_NAME = re.compile(r"(\d{1,3})_+([01])_+([0-4])_+\d{8,}\s*\.")
_WITHOUT_A_LABEL = re.compile(r"\d{1,3}(_+\d)?_+\d{8,}\s*\.")  # 39_1_20170116174525125.jpg
_OLDEST = 116
_NETWORK, _WIDTH = "resnet18", 256
_SIZE, _CROP = 140, 128  # pixels
_TASKS = (
    Task("age", "regression", "mae", "years"),
    Task("gender", "binary", "accuracy"),
    Task("ethnicity", "multiclass", "accuracy", classes=5),
)


class Faces(NamedTuple):
    """Files in the order of their names, targets, and how many files were left out.

    The targets, shape ``(n, 3)``, are age in years, gender (1: female), and ethnicity, 0 to 4.
    """

    files: list[Path]
    targets: Tensor
    left_out: int


def read() -> Faces:
    """Read the names; images of which a label is missing (3 in the archive) are left out.

    Raises:
        DataUnavailableError: If there are no images in the data folder.
        DataFileError: If the name of an image says something else than its labels.
    """
    folder = data_folder(FOLDER)
    require(folder.parent, [FOLDER], LAYOUT)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise DataUnavailableError(f"{folder} has no images. {LAYOUT}")
    labelled = [path for path in found if not _WITHOUT_A_LABEL.match(path.name)]
    targets = torch.tensor([_labels(path) for path in labelled]).view(-1, 3)
    return Faces(labelled, targets, len(found) - len(labelled))


def _labels(path: Path) -> tuple[float, float, float]:
    match = _NAME.match(path.name)
    if match is None or int(match[1]) > _OLDEST:
        raise DataFileError(
            f"{path}: the name is not [age]_[gender]_[race]_[date].jpg.chip.jpg with an age up to "
            f"{_OLDEST}, gender 0 or 1 and race 0 to 4; rename it or move it away"
        )
    return float(match[1]), float(match[2]), float(match[3])


def stratified(ages: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split 70/10/20 so that the parts have the same ages.

    In the order of ages (equal ones in random order), of each ten a random one is for validation
    and two are for test; what is left over is for training.

    Returns:
        Places of training, validation and test part, in random order.

    Raises:
        ValueError: If there are less than ten.
    """
    if len(ages) < 10:
        raise ValueError(f"{len(ages)} images cannot be split; at least 10 are needed")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(ages), generator=generator)
    order = shuffled[ages[shuffled].argsort(stable=True)]
    whole = len(ages) - len(ages) % 10
    tens = order[:whole].view(-1, 10)
    tens = tens.gather(1, torch.rand(tens.shape, generator=generator).argsort(1))
    parts = torch.cat([order[whole:], tens[:, 3:].flatten()]), tens[:, 0], tens[:, 1:3].flatten()
    train, val, test = (p[torch.randperm(len(p), generator=generator)] for p in parts)
    return train, val, test


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the file names; split 70/10/20, stratified by age. Images are read when needed."""
    faces = read()
    train, val, test = stratified(faces.targets[:, 0], seed=0)
    train = train[:max_train]
    ages = faces.targets[train, 0]
    scale = torch.tensor([max(ages.std().item(), 1e-6), 1.0, 1.0])
    targets = (faces.targets - torch.tensor([ages.mean().item(), 0.0, 0.0])) / scale
    create_transform = timm("data").create_transform
    values = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # from 0 to 1
    share = (_CROP / _SIZE) ** 2  # of the area, all of it the crop: nothing is scaled
    augment = create_transform(
        _CROP, is_training=True, scale=(share, share), ratio=(1, 1), color_jitter=None, **values
    )
    plain = create_transform(_CROP, is_training=False, crop_pct=_CROP / _SIZE, **values)

    def part(rows: Tensor, transform: Transform) -> ImageFiles:
        return ImageFiles(faces.files, rows, targets[rows], transform, _SIZE)

    return image_benchmark(
        _TASKS,
        (part(train, augment), part(val, plain), part(test, plain)),
        partial(resnet, _NETWORK, _WIDTH),
        _WIDTH,
        network=f"{_NETWORK}, random initialisation, {_WIDTH} ELU units",
        version={
            "files": listing_digest(faces.files),
            "without_a_label": faces.left_out,
            "split_seed": 0,
        },
        scale=scale,
    )


SOURCE = Source(
    title="UTKFace",
    load=load,
    settings=TrainSettings(epochs=100, batch_size=128, weight_decay=1e-4),
    preset="utkface",
    paper=paper_settings("utkface", "steps"),
    code=CODE,
)

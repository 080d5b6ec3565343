"""UTKFace: age (regression), gender (binary) and ethnicity (five classes) from a face."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import image_benchmark
from examples.comparison.tasks import Task
from examples.data import utkface
from examples.data.folder import content_digest, listing_digest
from examples.data.images import ImageFiles, compose, read_pixels, resized, torchvision_transforms
from examples.image_models import resnet
from examples.training import TrainSettings

_NETWORK, _WIDTH = "resnet18", 256
_SIZE, _CROP = 140, 128  # pixels
_TASKS = (
    Task("age", "regression", "mae", "years"),
    Task("gender", "binary", "accuracy"),
    Task("ethnicity", "multiclass", "accuracy", classes=5),
)


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the file names; split 70/10/20, stratified by age. Images are read when needed.

    Raises:
        DataUnavailableError: If the images are not in the data folder, or there is no torchvision.
        DataFileError: If an image has a wrong name.
    """
    faces = utkface.read()
    v2 = torchvision_transforms()
    train, val, test = utkface.stratified(faces.targets[:, 0], seed=0)
    train = train[:max_train]
    ages = faces.targets[train, 0]
    scale = torch.tensor([max(ages.std().item(), 1e-6), 1.0, 1.0])
    targets = (faces.targets - torch.tensor([ages.mean().item(), 0.0, 0.0])) / scale
    flips = [v2.RandomCrop(_CROP), v2.RandomHorizontalFlip()]
    augment = compose(v2, flips, normalise=False)
    plain = compose(v2, [v2.CenterCrop(_CROP)], normalise=False)

    def read(place: int) -> Tensor:
        return resized(read_pixels(faces.files[place], "RGB"), _SIZE)

    return image_benchmark(
        _TASKS,
        (
            ImageFiles(read, train, targets[train], augment),
            ImageFiles(read, val, targets[val], plain),
            ImageFiles(read, test, targets[test], plain),
        ),
        partial(resnet, _NETWORK, _WIDTH),
        _WIDTH,
        network=f"{_NETWORK}, random initialisation, {_WIDTH} ELU units",
        version={
            "files": listing_digest(faces.files),
            "without_a_label": faces.left_out,
            "reader": content_digest([Path(utkface.__file__)]),
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
)

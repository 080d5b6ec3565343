"""UTKFace: age (regression), gender (binary) and ethnicity (five classes) from a face."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import CODE, image_benchmark
from examples.comparison.tasks import Task
from examples.data import utkface
from examples.data.folder import listing_digest
from examples.data.images import ImageFiles, Transform
from examples.image_models import resnet, timm
from examples.training import TrainSettings

_NETWORK, _WIDTH = "resnet18", 256
_SIZE, _CROP = 140, 128  # pixels
_TASKS = (
    Task("age", "regression", "mae", "years"),
    Task("gender", "binary", "accuracy"),
    Task("ethnicity", "multiclass", "accuracy", classes=5),
)


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the file names; split 70/10/20, stratified by age. Images are read when needed."""
    faces = utkface.read()
    train, val, test = utkface.stratified(faces.targets[:, 0], seed=0)
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
    code=(utkface, *CODE),
)

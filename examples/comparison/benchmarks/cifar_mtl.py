"""CIFAR-MTL: the 20 coarse labels of CIFAR-100, each against the rest, as 20 binary tasks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import CODE, image_benchmark
from examples.comparison.tasks import Task, joint_accuracy
from examples.data import cifar100
from examples.data.folder import content_digest, data_folder
from examples.data.images import StoredImages
from examples.image_models import cnn
from examples.training import TrainSettings

_CHANNELS = 160
_MEAN, _STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of the training images
_VAL_SHARE = 10  # a tenth of the training images is the validation part


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the images; 45,000 for training, 5,000 for validation, the official 10,000 for test."""
    train_set, test, names = cifar100.read()
    count = len(train_set.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train, val = order.split([count - count // _VAL_SHARE, count // _VAL_SHARE])

    def part(data: cifar100.Cifar100, rows: Tensor | slice) -> StoredImages:
        targets = F.one_hot(data.labels[rows], len(names)).float()
        return StoredImages(data.images[rows], targets, _MEAN, _STD)

    tasks = [Task(name, "binary", "accuracy") for name in names]
    files = [data_folder(cifar100.FOLDER) / name for name in ("train", "test")]
    return image_benchmark(
        tasks,
        (part(train_set, train[:max_train]), part(train_set, val), part(test, slice(None))),
        partial(cnn, _CHANNELS),
        _CHANNELS,
        network=f"CNN, three convolutions of {_CHANNELS} channels, batch norm",
        version={
            "files": content_digest(files),
            "split_seed": 0,
        },
        extra={"accuracy of the best-scoring task": partial(joint_accuracy, tasks)},
    )


SOURCE = Source(
    title="CIFAR-MTL",
    load=load,
    settings=TrainSettings(epochs=50, batch_size=128, weight_decay=1e-4),
    preset="cifar_mtl",
    paper=paper_settings("cifar_mtl", "steps"),
    code=(cifar100, *CODE),
)

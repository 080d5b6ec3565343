"""Yeast: 14 binary functional classes of 2,417 genes, from ``river``."""

from __future__ import annotations

import pandas as pd
import torch

from examples.comparison.benchmark import Benchmark, Source, table_benchmark
from examples.comparison.tasks import Task
from examples.data import split_indices
from examples.data.packages import package_file
from examples.training import TrainSettings

_REQUIREMENT = "river"


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read 103 measurements per gene; split 60/20/20.

    Raises:
        DataUnavailableError: If ``river`` is not installed.
    """
    table = pd.read_csv(package_file("river", "datasets/yeast.csv.gz", _REQUIREMENT))
    classes = [column for column in table if column.startswith("Class")]
    return table_benchmark(
        [Task(name, "binary", "auroc") for name in classes],
        torch.from_numpy(table.drop(columns=classes).to_numpy("float64")),
        torch.from_numpy(table[classes].to_numpy("float64")),
        split_indices(len(table), val_fraction=0.2, test_fraction=0.2, seed=0),
        widths=(128, 64),
        version={"split_seed": 0},
        package="river",
        max_train=max_train,
    )


SOURCE = Source(
    title="Yeast",
    load=load,
    settings=TrainSettings(epochs=40, batch_size=64, learning_rate=2e-3),
    preset="chestxray14",
)

"""QM9 by geometric descriptors: 11 regressions, a cheap proxy for the paper's graph network."""

from __future__ import annotations

import torch

from examples.comparison.benchmark import Benchmark, Source, table_benchmark
from examples.comparison.tasks import Task
from examples.data import split_indices
from examples.data.descriptors import SETTINGS
from examples.data.qm9 import TARGETS, TOTAL_MOLECULES, load_arrays
from examples.training import TrainSettings

_MOLECULES = 30_000


def load(molecules: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the descriptors of random molecules; split 80/10/10.

    Raises:
        DataUnavailableError: If ``qm9pack`` is not installed.
    """
    count = molecules or _MOLECULES
    features, targets = (torch.from_numpy(array) for array in load_arrays(count))
    return table_benchmark(
        [Task(target.name, "regression", "mae", target.unit) for target in TARGETS],
        features.double(),
        targets,
        split_indices(count, val_fraction=0.1, test_fraction=0.1, seed=0),
        widths=(256, 256, 64),
        version={"molecules": count, "split_seed": 0, "descriptors": SETTINGS},
        package="qm9pack",
        max_train=max_train,
    )


SOURCE = Source(
    title="QM9 proxy",
    load=load,
    settings=TrainSettings(epochs=30, batch_size=120),
    preset="qm9",
    size=_MOLECULES,
    size_name="molecules",
    size_range=(100, TOTAL_MOLECULES),
)

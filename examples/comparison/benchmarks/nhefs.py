"""NHEFS, a health survey from ``causaldata``: age, sex, race and education of 1,629 people."""

from __future__ import annotations

import pandas as pd
import torch

from examples.comparison.benchmark import Benchmark, Source, table_benchmark
from examples.comparison.tasks import Task
from examples.data import split_indices
from examples.data.packages import package_file
from examples.training import TrainSettings

_REQUIREMENT = "causaldata"
_TASKS = (
    Task("age", "regression", "mae", "years"),
    Task("sex", "binary", "accuracy"),
    Task("race", "binary", "auroc"),  # 13 % against 87 %
    Task("education", "multiclass", "accuracy", classes=5),
)
# Identifiers, the targets, and columns that hold a target: years of school are education, years
# of smoking and `older` are age; birth control and pregnancies were asked of women only.
_LEFT_OUT = (
    *("seqn", "id", "age", "sex", "race", "education", "school", "smokeyrs", "older"),
    *("birthcontrol", "pregnancies"),
)


def load(size: int | None = None, max_train: int | None = None, split_seed: int = 0) -> Benchmark:
    """Read the survey; split 60/20/20.

    A missing value becomes the median of its column, with a column that says so.

    Raises:
        DataUnavailableError: If ``causaldata`` is not installed.
    """
    path = package_file("causaldata", "nhefs/nhefs.dta", _REQUIREMENT)
    table = pd.read_stata(path, convert_categoricals=False)
    targets = table[[task.name for task in _TASKS]].astype("float64")
    classes = [task.name for task in _TASKS if task.kind != "regression"]
    targets[classes] -= targets[classes].min()  # Stata's codes start at 1
    inputs = table.drop(columns=list(_LEFT_OUT)).astype("float64")
    missing = inputs.isna()
    missing = missing.loc[:, missing.any()].T.drop_duplicates().T  # once where always together
    inputs = inputs.fillna(inputs.median())
    return table_benchmark(
        _TASKS,
        torch.from_numpy(pd.concat([inputs, missing], axis=1).to_numpy("float64")),
        torch.from_numpy(targets.to_numpy()),
        split_indices(len(table), val_fraction=0.2, test_fraction=0.2, seed=split_seed),
        widths=(64, 32),
        version={"split_seed": split_seed, "left_out": _LEFT_OUT},
        package="causaldata",
        max_train=max_train,
    )


SOURCE = Source(
    title="NHEFS",
    load=load,
    settings=TrainSettings(epochs=40, batch_size=64, learning_rate=2e-3),
    preset="utkface",
)

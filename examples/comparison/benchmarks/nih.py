"""The label table of ChestX-ray14: 14 findings from what is known without the image."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from examples.comparison.benchmark import Benchmark, Source, table_benchmark
from examples.comparison.tasks import Task
from examples.data import split_indices
from examples.data.packages import package_file
from examples.training import TrainSettings

_REQUIREMENT = "torchxrayvision"
_PATIENTS, _ALL_PATIENTS = 6_000, 30_805


def load(patients: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the rows of random patients; split 60/20/20 by patient.

    Raises:
        DataUnavailableError: If ``torchxrayvision`` is not installed.
    """
    count = patients or _PATIENTS
    path = package_file("torchxrayvision", "data/Data_Entry_2017_v2020.csv.gz", _REQUIREMENT)
    table = pd.read_csv(path)
    people = table["Patient ID"].unique()
    chosen = np.random.default_rng(0).permutation(people)[:count]
    findings = table["Finding Labels"].str.get_dummies("|").drop(columns="No Finding")
    inputs = _inputs(table)
    place = table["Patient ID"].map(pd.Series(range(count), chosen))
    parts = []
    for part in split_indices(count, val_fraction=0.2, test_fraction=0.2, seed=0):
        rows = np.flatnonzero(place.isin(part.numpy()))
        # In random order, so that the first ones are of many patients.
        parts.append(torch.from_numpy(np.random.default_rng(0).permutation(rows)))
    return table_benchmark(
        [Task(name, "binary", "auroc") for name in findings],
        torch.from_numpy(inputs.to_numpy("float64")),
        torch.from_numpy(findings.to_numpy("float64")),
        (parts[0], parts[1], parts[2]),
        widths=(128, 64),
        version={"patients": count, "split_seed": 0},
        package="torchxrayvision",
        max_train=max_train,
    )


def _inputs(table: pd.DataFrame) -> pd.DataFrame:
    """Age, sex, view, number of the follow-up, and the size of the image."""
    age = table["Patient Age"].clip(upper=100)  # a few are years of birth or the like
    follow_up = np.log1p(table["Follow-up #"])
    return pd.DataFrame(
        {
            "age": age,
            "age_squared": age**2,
            "male": table["Patient Gender"] == "M",
            "frontal_ap": table["View Position"] == "AP",
            "follow_up": follow_up,
            "first": table["Follow-up #"] == 0,
            "width": table["OriginalImage[Width"],
            "height": table["Height]"],
            "spacing": table["OriginalImagePixelSpacing[x"],
        }
    )


SOURCE = Source(
    title="ChestX-ray14 labels",
    load=load,
    settings=TrainSettings(epochs=10, batch_size=256, learning_rate=2e-3),
    preset="chestxray14",
    size=_PATIENTS,
    size_name="patients",
    size_range=(100, _ALL_PATIENTS),
)

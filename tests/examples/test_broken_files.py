"""Files of the image benchmarks that are broken: what is wrong is said, and where."""

import os
import pickle

import numpy as np
import pytest

from examples.comparison.benchmarks import celeba, chestxray14, cifar_mtl, utkface
from examples.data import DataFileError, DataUnavailableError
from tests.examples.image_files import (
    python2_pickle,
    write_celeba,
    write_chest,
    write_cifar,
    write_faces,
)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def cifar(**changed):
    content = {"data": np.zeros((3, 3072), "u1"), "coarse_labels": [0, 1, 2]} | changed
    return python2_pickle({key: value for key, value in content.items() if value is not None})


# Each returns a change of a data set's folder, which returns what has to be named.
def edited(file, old, new):
    def change(folder):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))
        return folder

    return change


def written(file, content, named=None):
    def change(folder):
        (folder / file).write_bytes(content)
        return folder / (file if named is None else named)

    return change


def gone(file):
    def change(folder):
        (folder / file).unlink()
        return folder

    return change


# How a folder is written, and how it is read.
SETS = {
    "cifar-100-python": (write_cifar, cifar_mtl.read),
    "UTKFace": (lambda data: write_faces(data, 10), utkface.read),
    "ChestX-ray14": (write_chest, lambda: chestxray14.read(None, seed=0)),
    "celeba": (lambda data: write_celeba(data, width=8, height=8), celeba.read),
}
TABLE, LISTS = "Data_Entry_2017_v2020.csv", ("train_val_list.txt", "test_list.txt")
ATTRIBUTES, PARTS = "list_attr_celeba.txt", "list_eval_partition.txt"
NO_NAMES = [
    *("face.jpg", "10_7_0_20170116174525125.jpg.chip.jpg", "10_1_0.jpg"),
    *("10_1_9_20170116174525125.jpg.chip.jpg", "200_1_0_20170116174525125.jpg.chip.jpg"),
]
BROKEN = {
    "cifar-100-python": [
        (written("train", b""), "EOFError"),
        (written("train", cifar()[:-200]), "extract or download it again"),
        (written("train", b"<html>"), "not a file of CIFAR-100"),
        (written("train", cifar(coarse_labels=None)), "'coarse_labels' is missing"),
        (written("train", cifar(coarse_labels=[0, 1])), "as the 2 coarse labels have it"),
        (written("train", cifar(coarse_labels=[0, 1, 20])), "from 0 to 19"),
        (written("train", cifar(data=np.zeros((3, 3072)))), "float64"),
        (written("train", cifar(data=np.zeros((3, 300), "u1"))), r"\(3, 300\)"),
        (written("train", pickle.dumps(Harmful(), 2)), "which is no array"),
    ],
    "UTKFace": [(written(name, b""), r"the name is not \[age\]") for name in NO_NAMES],
    "ChestX-ray14": [
        (edited(TABLE, "Patient ID", "Other"), "the column 'Patient ID' is missing"),
        (edited(TABLE, "Finding Labels", "Other"), "'Finding Labels' is missing"),
        (edited(TABLE, "No Finding", "Cold"), r"unknown finding in 'Cold' of \d{8}_\d{3}.png"),
        (edited(TABLE, "No Finding", ""), "a value of .* is missing"),
        (written(TABLE, b""), "cannot be read as a table"),
        (edited(LISTS[0], "00000003_001.png", ""), r"1 images \(00000003_001.png\)"),
        (
            written(LISTS[1], b"00000001_000.png\n" * 2, named=""),
            r"12 images \(.*, …\) of .* in neither train_val_list.txt nor",
        ),
        (
            edited(LISTS[1], "00000024_001.png", "00000024_001.png\n00000003_001.png"),
            "patient 3 has images in both lists",
        ),
        (gone("images/00000002_000.png"), "00000002_000.png not found.*https"),
        (gone(LISTS[1]), "test_list.txt not found"),
    ],
    "celeba": [
        (edited(ATTRIBUTES, " -1", " 0"), "40 values of -1 or 1"),
        (edited(ATTRIBUTES, ".jpg", ".jpg 1"), "list_attr_celeba.txt"),
        (edited(ATTRIBUTES, "Attribute_39", ""), "40 values"),
        (written(ATTRIBUTES, b""), "cannot be read as a table"),
        (edited(PARTS, "000002.jpg", "2.jpg"), "in order"),
        (edited(PARTS, "0\n", "3\n"), "should be 0, 1 or 2"),
        (gone("img_align_celeba/000007.jpg"), "000007.jpg not found.*https://mmlab"),
    ],
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [(name, *case) for name, cases in BROKEN.items() for case in cases],
)
def test_what_is_broken_is_named(name, change, message, data, monkeypatch):
    write, read = SETS[name]
    write(data)
    monkeypatch.chdir(data)
    named = change(data / name)
    error = DataUnavailableError if "not found" in message else DataFileError
    with pytest.raises(error, match=message) as failure:
        read()
    assert str(named) in str(failure.value)
    assert not (data / "harm").exists()

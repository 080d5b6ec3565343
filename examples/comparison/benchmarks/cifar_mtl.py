"""CIFAR-MTL: the 20 coarse labels of CIFAR-100, each against the rest, as 20 binary tasks."""

from __future__ import annotations

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.images import CODE, StoredImages, image_benchmark
from examples.comparison.tasks import Task, joint_accuracy
from examples.data import DataFileError, content_digest, data_folder, require
from examples.image_models import cnn
from examples.training import TrainSettings

FOLDER = "cifar-100-python"
LAYOUT = (
    "CIFAR-100, python version (cifar-100-python.tar.gz, 161 MB), is downloaded from "
    "https://www.cs.toronto.edu/~kriz/cifar.html; the files train, test and meta of the archive "
    f"belong into {FOLDER}/ in the data folder, which is where "
    "torchvision.datasets.CIFAR100(root, download=True) puts them too."
)
_BYTES = 3 * 32 * 32
# What the pickled arrays are made of; anything else in a pickle could run code.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_CHANNELS = 160
_MEAN, _STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # of the training images
_VAL_SHARE = 10  # a tenth of the training images is the validation part


class Cifar100(NamedTuple):
    """Images, shape ``(n, 3, 32, 32)``, uint8, and coarse labels, shape ``(n,)``."""

    images: Tensor
    labels: Tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is no array")
        if name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # wherever this version of NumPy has it
        return super().find_class(module, name)


def read() -> tuple[Cifar100, Cifar100, list[str]]:
    """Training and test set, and the names of the 20 coarse labels.

    Raises:
        DataUnavailableError: If a file is missing.
        DataFileError: If a file is not what it should be.
    """
    folder = data_folder(FOLDER)
    require(folder, ("train", "test", "meta"), LAYOUT)
    names = _unpickle(folder / "meta", "coarse_label_names")["coarse_label_names"]
    return _read(folder / "train", len(names)), _read(folder / "test", len(names)), list(names)


def _read(path: Path, classes: int) -> Cifar100:
    content = _unpickle(path, "data", "coarse_labels")
    pixels, labels = np.asarray(content["data"]), np.asarray(content["coarse_labels"])
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _BYTES):
        raise DataFileError(
            f"{path}: data is {pixels.dtype} of shape {pixels.shape}, not uint8 of shape "
            f"{(len(labels), _BYTES)} as the {len(labels)} coarse labels have it"
        )
    if not (np.issubdtype(labels.dtype, np.integer) and set(labels.tolist()) <= {*range(classes)}):
        raise DataFileError(f"{path}: a coarse label is not a whole number from 0 to {classes - 1}")
    return Cifar100(
        torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()),
        torch.from_numpy(labels.astype(np.int64)),
    )


def _unpickle(path: Path, *keys: str) -> dict[str, Any]:
    """Read a pickle of Python 2 that has the keys."""
    try:
        content: dict[str, Any] = _Unpickler(
            io.BytesIO(path.read_bytes()), encoding="latin1"
        ).load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError, OSError) as error:
        raise DataFileError(
            f"{path} is not a file of CIFAR-100 ({type(error).__name__}: {error}); extract or "
            "download it again"
        ) from error
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise DataFileError(f"{path}: {key!r} is missing; is it the python version?")
    return content


def load(size: int | None = None, max_train: int | None = None) -> Benchmark:
    """Read the images; 45,000 for training, 5,000 for validation, the official 10,000 for test."""
    train_set, test, names = read()
    count = len(train_set.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    train, val = order.split([count - count // _VAL_SHARE, count // _VAL_SHARE])

    def part(data: Cifar100, rows: Tensor | slice) -> StoredImages:
        targets = F.one_hot(data.labels[rows], len(names)).float()
        return StoredImages(data.images[rows], targets, _MEAN, _STD)

    tasks = [Task(name, "binary", "accuracy") for name in names]
    files = [data_folder(FOLDER) / name for name in ("train", "test")]
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
    code=CODE,
)

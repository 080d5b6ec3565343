"""CIFAR-100 with its coarse labels, from the files of its archive.

torchvision's class reads the same files but gives the 100 fine labels only.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.data.folder import DataFileError, data_folder, require

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

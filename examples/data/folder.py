"""The folder of data sets that are downloaded by hand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from examples.data import DataUnavailableError

_SHOWN = 3  # names in a message


class DataFileError(ValueError):
    """A file of a data set is not what it should be; the message names it."""


def data_folder(name: str) -> Path:
    """Folder ``name`` inside that of the environment variable ``BAYESAGG_DATA`` (``data/``)."""
    return Path(os.environ.get("BAYESAGG_DATA") or "data").expanduser() / name


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

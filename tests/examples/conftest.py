"""Folders of the tests' own for the data of the examples and for what they keep."""

from functools import lru_cache

import pytest
import torch

from examples.comparison import runs
from examples.data import molecules, package_file, qm9
from examples.loops import data as loops_data

_read = lru_cache(qm9.read_frame)


@pytest.fixture(scope="session", autouse=True)
def frame_read_once():
    """QM9's files are read once by a process: it takes seconds."""

    def read(*_):
        package_file("qm9pack", "data/qm9_part1.csv", "qm9pack==1.0.3")  # a test may hide it
        return _read("SMILES")

    with pytest.MonkeyPatch.context() as patch:
        for module in (qm9, molecules, loops_data):
            patch.setattr(module, "read_frame", read)
        yield


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The data folder; nothing is downloaded into it."""

    def refuse(url, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("BAYESAGG_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    runs.load.cache_clear()
    yield tmp_path / "data"
    runs.load.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Not the user's."""
    monkeypatch.setenv("BAYESAGG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

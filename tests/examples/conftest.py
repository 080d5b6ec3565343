"""Folders of the tests' own for the data of the examples and for what they keep."""

import pytest
import torch

from examples.comparison import runs


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

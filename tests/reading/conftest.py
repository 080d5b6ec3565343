"""What every test of reading shares: a step whose backward pass has run."""

import pytest

from bayesagg.reading import Reader


@pytest.fixture(autouse=True)
def _every_reading_counts(monkeypatch):
    """What a reading has verified counts once its backward pass has run, which is not run here."""
    read = Reader.read

    def read_and_remember(self, *args, **kwargs):
        batch = read(self, *args, **kwargs)
        self.known.update(self.take())
        return batch

    monkeypatch.setattr(Reader, "read", read_and_remember)

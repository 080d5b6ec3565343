"""The benchmarks by name; each is a file of this folder."""

from __future__ import annotations

from examples.comparison.benchmark import Source
from examples.comparison.benchmarks import mnist, nhefs, nih, qm9, yeast

SOURCES: dict[str, Source] = {
    "qm9": qm9.SOURCE,
    "mnist": mnist.SOURCE,
    "yeast": yeast.SOURCE,
    "nhefs": nhefs.SOURCE,
    "nih": nih.SOURCE,
}

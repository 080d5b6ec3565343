"""The benchmarks by name."""

from __future__ import annotations

from examples.comparison.benchmark import Source
from examples.comparison.benchmarks import (
    celeba,
    chestxray14,
    cifar_mtl,
    movielens,
    multi_mnist,
    nyuv2,
    qm9_mpnn,
    tables,
    utkface,
)

SOURCES: dict[str, Source] = {
    "qm9": tables.QM9,
    "qm9-towers": tables.TOWERS,
    "qm9-experts": tables.EXPERTS,
    "qm9-mpnn": qm9_mpnn.SOURCE,
    "qm9-mpnn-bonds": qm9_mpnn.BONDS,
    "qm9-mpnn-small": qm9_mpnn.SMALL,
    "mnist": tables.MNIST,
    "multi-mnist": multi_mnist.SOURCE,
    "yeast": tables.YEAST,
    "nhefs": tables.NHEFS,
    "nih": tables.NIH,
    "movielens-mmoe": movielens.MMOE,
    "movielens-ple": movielens.PLE,
    "cifar-mtl": cifar_mtl.SOURCE,
    "celeba": celeba.SOURCE,
    "chestxray14": chestxray14.SOURCE,
    "nyuv2": nyuv2.SOURCE,
    "utkface": utkface.SOURCE,
}

"""The benchmarks by name; each is a file of this folder."""

from __future__ import annotations

from examples.comparison.benchmark import Source
from examples.comparison.benchmarks import (
    celeba,
    chestxray14,
    cifar_mtl,
    mnist,
    movielens,
    multi_mnist,
    nhefs,
    nih,
    nyuv2,
    qm9,
    qm9_mpnn,
    qm9_private,
    utkface,
    yeast,
)

SOURCES: dict[str, Source] = {
    "qm9": qm9.SOURCE,
    "qm9-towers": qm9_private.TOWERS,
    "qm9-experts": qm9_private.EXPERTS,
    "qm9-mpnn": qm9_mpnn.SOURCE,
    "qm9-mpnn-bonds": qm9_mpnn.BONDS,
    "mnist": mnist.SOURCE,
    "multi-mnist": multi_mnist.SOURCE,
    "yeast": yeast.SOURCE,
    "nhefs": nhefs.SOURCE,
    "nih": nih.SOURCE,
    "movielens-mmoe": movielens.MMOE,
    "movielens-ple": movielens.PLE,
    "cifar-mtl": cifar_mtl.SOURCE,
    "celeba": celeba.SOURCE,
    "chestxray14": chestxray14.SOURCE,
    "nyuv2": nyuv2.SOURCE,
    "utkface": utkface.SOURCE,
}

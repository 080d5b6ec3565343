"""Descriptors of a molecule's geometry: a fixed vector that an MLP can read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

ATOMIC_NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
MAX_ATOMS = 29
# Raise the version with any change of what descriptors() returns, or old caches would be read.
SETTINGS = {"version": 1, "first_angstrom": 0.75, "step_angstrom": 0.5, "bins": 16}

_ANGSTROM_PER_BOHR = 0.529177
_BINS = int(SETTINGS["bins"])
_ELEMENTS = len(ATOMIC_NUMBERS)
_PAIRS = _ELEMENTS * (_ELEMENTS + 1) // 2
_CHUNK = 2048  # molecules at once: bounds the (chunk, atoms, atoms, 3) differences to 50 MB


def descriptors(numbers: Integers, positions: Floats) -> Floats:
    """Compute a vector per molecule that does not change under rotation or renumbering of atoms.

    Args:
        numbers: Atomic numbers, shape ``(n, 29)``, 0 for padding.
        positions: Coordinates in Å, shape ``(n, 29, 3)``.

    Returns:
        Shape ``(n, 274)``, float32: 29 eigenvalues of the Coulomb matrix in hartree, by descending
        magnitude; counts of H, C, N, O, F; for each of the 15 pairs of elements a histogram of
        distances with 16 bins.
    """
    sizes = (numbers > 0).sum(axis=1)
    counts_end = MAX_ATOMS + _ELEMENTS
    result = np.zeros((len(numbers), counts_end + _PAIRS * _BINS), np.float32)
    # Molecules of one size together: no padding reaches the eigenvalues or the pairs.
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        for part in np.split(rows, range(_CHUNK, len(rows), _CHUNK)):
            z, xyz = numbers[part, :size], positions[part, :size]
            distance = np.linalg.norm(xyz[:, :, None] - xyz[:, None], axis=-1)
            result[part, :size] = _coulomb_eigenvalues(z, distance)
            counts = [(z == number).sum(axis=1) for number in ATOMIC_NUMBERS.values()]
            result[part, MAX_ATOMS:counts_end] = np.stack(counts, axis=1)
            result[part, counts_end:] = _distance_histograms(z, distance)
    return result


def _coulomb_eigenvalues(z: Integers, distance: Floats) -> Floats:
    """Eigenvalues, shape ``(n, atoms)`` in hartree, of 0.5 Z_i^2.4 and Z_i Z_j / |R_i - R_j|."""
    atoms = np.arange(z.shape[1])
    divisor = distance / _ANGSTROM_PER_BOHR
    divisor[:, atoms, atoms] = 1.0
    coulomb = z[:, :, None] * z[:, None] / divisor
    coulomb[:, atoms, atoms] = 0.5 * z.astype(np.float64) ** 2.4
    values = np.linalg.eigvalsh(coulomb)
    order = np.argsort(-np.abs(values), axis=1)
    return np.take_along_axis(values, order, axis=1)


def _distance_histograms(z: Integers, distance: Floats) -> Floats:
    """Histograms of pair distances per pair of elements, shape ``(n, 15 * bins)``.

    A pair is shared between the two nearest bin centres in proportion, so that the histogram is
    continuous in the positions; distances beyond the last centre count there.
    """
    n = len(z)
    first, second = np.triu_indices(z.shape[1], k=1)
    kind = np.searchsorted(list(ATOMIC_NUMBERS.values()), z)
    low, high = np.sort([kind[:, first], kind[:, second]], axis=0)
    pair = low * _ELEMENTS + high - low * (low + 1) // 2
    place = (distance[:, first, second] - SETTINGS["first_angstrom"]) / SETTINGS["step_angstrom"]
    place = place.clip(0, _BINS - 1)
    left = np.minimum(place.astype(np.int64), _BINS - 2)
    share = place - left
    slot = ((np.arange(n)[:, None] * _PAIRS + pair) * _BINS + left).ravel()
    length = n * _PAIRS * _BINS
    histogram = np.bincount(slot, (1 - share).ravel(), minlength=length)
    histogram += np.bincount(slot + 1, share.ravel(), minlength=length)
    return histogram.reshape(n, _PAIRS * _BINS)

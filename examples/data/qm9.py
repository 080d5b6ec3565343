"""QM9 from the package ``qm9pack``: geometric descriptors of the molecules and 11 targets.

The molecules, their geometries and the targets are those of Ramakrishnan et al., "Quantum chemistry
structures and properties of 134 kilo molecules" (2014), without the molecules that failed the
authors' consistency check. A message-passing network on the molecular graph, as in the paper, takes
hours; here each molecule is described by a fixed vector that an MLP reads in milliseconds: sorted
eigenvalues of the Coulomb matrix (Rupp et al., 2012), atom counts, and a histogram of the pair
distances for each pair of elements.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from examples.data import package_file

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


class Target(NamedTuple):
    """A target of QM9: short name, column of the CSV files (spelt as shipped), unit."""

    name: str
    column: str
    unit: str


TARGETS = (
    Target("mu", "Dipole_debye", "D"),
    Target("alpha", "Polarizability_bohr3", "bohr^3"),
    Target("homo", "HOMO_au", "Ha"),
    Target("lumo", "LUMO_au", "Ha"),
    Target("r2", "R2_bohr2", "bohr^2"),
    Target("zpve", "ZPVE_au", "Ha"),
    Target("u0", "InternalEnergy_0K_au", "Ha"),
    Target("u", "InternalEnergy_298K_au", "Ha"),
    Target("h", "Enthalphy_298K_au", "Ha"),
    Target("g", "GibbsFreeEnergy_298K_au", "Ha"),
    Target("cv", "Heatcapacity_Cv_cal_mol_K", "cal/mol/K"),
)
TOTAL_MOLECULES = 130_831


def read_frame(*more: str) -> pd.DataFrame:
    """Read the molecules and targets that ``qm9pack`` ships.

    The files are read by path because importing the package needs an old setuptools.

    Args:
        more: Other columns to read, such as ``SMILES``.

    Returns:
        130,831 rows: ``Elements`` and ``XYZ_Ang`` as text, and the target columns.

    Raises:
        DataUnavailableError: If ``qm9pack`` is not installed, or its files are not where version
            1.0.3 has them.
    """
    columns = ["Elements", "XYZ_Ang", *more, *(target.column for target in TARGETS)]
    names = [f"data/qm9_part{i}.csv" for i in (1, 2, 3)]
    files = [package_file("qm9pack", name, "qm9pack==1.0.3") for name in names]
    parts = [pd.read_csv(file, usecols=columns) for file in files]
    return pd.concat(parts, ignore_index=True)


def parse_geometry(elements: pd.Series[str], xyz: pd.Series[str]) -> tuple[Integers, Floats]:
    """Parse the two text columns of ``qm9pack`` into padded arrays.

    Args:
        elements: Such as ``"['C','H']"``, one per molecule.
        xyz: Such as ``"[[0.1,5.E-10,-2.],[0.,1.,0.]]"``, one per molecule, in Å. JSON has no
            numbers like ``5.E-10``; this parser takes them.

    Returns:
        Atomic numbers, shape ``(n, 29)``, int64, and coordinates in Å, shape ``(n, 29, 3)``,
        float64; both are 0 beyond the molecule's atoms.

    Raises:
        ValueError: On an unknown element, or where coordinates and elements differ in number.
    """
    lengths = np.zeros(len(elements), dtype=np.int64)
    symbols: list[str] = []
    for row, text in enumerate(elements):
        atoms = text.strip("[]").replace("'", "").replace(" ", "").split(",")
        lengths[row] = len(atoms)
        symbols.extend(atoms)
    try:
        flat_numbers = np.array([ATOMIC_NUMBERS[symbol] for symbol in symbols])
    except KeyError as error:
        raise ValueError(f"unknown element {error} in the column Elements") from error
    # One split of the joined text parses 7 million numbers in a second; a loop takes a minute.
    joined = ",".join(xyz).replace("[", "").replace("]", "")
    coordinates = np.array(joined.split(","), dtype=np.float64)
    if coordinates.size != 3 * flat_numbers.size:
        raise ValueError(
            f"the column XYZ_Ang holds {coordinates.size} coordinates, "
            f"{3 * flat_numbers.size} are needed for the atoms of the column Elements"
        )
    occupied = np.arange(MAX_ATOMS) < lengths[:, None]
    numbers = np.zeros((len(lengths), MAX_ATOMS), dtype=np.int64)
    positions = np.zeros((len(lengths), MAX_ATOMS, 3))
    numbers[occupied] = flat_numbers
    positions[occupied] = coordinates.reshape(-1, 3)
    return numbers, positions


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


def load_arrays(molecules: int, *, seed: int = 0) -> tuple[Floats, Floats]:
    """Descriptors and targets of a random choice of molecules, from the cache where it has them.

    The cache is the folder of the environment variable ``BAYESAGG_CACHE``, by default
    ``~/.cache/bayesagg``; deleting it is safe.

    Args:
        molecules: How many of the 130,831 molecules.
        seed: Seed of the choice.

    Returns:
        Descriptors, shape ``(molecules, 274)``, float32, as of :func:`descriptors`, and targets,
        shape ``(molecules, 11)``, float64, in the units of :data:`TARGETS`.

    Raises:
        DataUnavailableError: If ``qm9pack`` is not installed.
        ValueError: If there are not that many molecules.
    """
    if not 1 <= molecules <= TOTAL_MOLECULES:
        raise ValueError(f"QM9 has {TOTAL_MOLECULES} molecules, {molecules} were asked for")
    path = _cache_path(molecules, seed)
    cached = _read_cache(path)
    if cached is not None:
        return cached
    frame = read_frame()
    chosen = frame.iloc[np.random.default_rng(seed).permutation(len(frame))[:molecules]]
    features = descriptors(*parse_geometry(chosen["Elements"], chosen["XYZ_Ang"]))
    targets = chosen[[target.column for target in TARGETS]].to_numpy(np.float64)
    _write_cache(path, features, targets)
    return features, targets


def _cache_path(molecules: int, seed: int) -> Path:
    """File that holds these features: its name changes with all they depend on."""
    default = Path.home() / ".cache" / "bayesagg"
    folder = Path(os.environ.get("BAYESAGG_CACHE") or default).expanduser()
    try:
        version = importlib.metadata.version("qm9pack")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    key = {"qm9pack": version, "molecules": molecules, "seed": seed, **SETTINGS}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"qm9-{molecules}-{digest}.npz"


def _read_cache(path: Path) -> tuple[Floats, Floats] | None:
    """Arrays of the cache, ``None`` where the file is absent or cannot be read."""
    try:
        with np.load(path) as arrays:
            return arrays["features"], arrays["targets"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, features: Floats, targets: Floats) -> None:
    """Write the arrays in one go: a reader sees the whole file or none, however many write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            np.savez(temporary, features=features, targets=targets)
            os.replace(temporary, path)
    except OSError as error:
        warnings.warn(
            f"the descriptors of QM9 were not cached ({error}); "
            "set BAYESAGG_CACHE to a folder that can be written",
            stacklevel=3,
        )

"""QM9 as molecular graphs: atoms, positions and bonds, with the targets of the paper.

From the package ``qm9pack``, or from a folder that ``torch_geometric.datasets.QM9`` has filled.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data import DATA_VARIABLE, DataUnavailableError
from examples.data.qm9 import (
    ATOMIC_NUMBERS,
    MAX_ATOMS,
    TARGETS,
    TOTAL_MOLECULES,
    Floats,
    Integers,
    parse_geometry,
    read_frame,
)

NODE_FEATURES = 11
BOND_TYPES = 4  # single, double, triple, aromatic: the last is in neither source

# In the order of qm9.TARGETS, of which the energies are in meV here, as in the paper.
MEV = ("homo", "lumo", "zpve", "u0", "u", "h", "g")
_MEV_PER_HARTREE = 27_211.386246
# Energies of single atoms in hartree, from the data set (atomref.txt): H, C, N, O, F.
_ATOM_ENERGIES = {
    "u0": (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730),
    "u": (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314),
    "h": (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370),
    "g": (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544),
}
_PYG_COLUMNS = (0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11)  # of its y: those targets, in eV
_PYG_FILE = "QM9/processed/data_v3.pt"
_LONGEST_BOND, _MISFIT = 1.7, 2.5  # Å; no two heavy atoms without a bond are closer than 1.7
_CHUNK = 4096  # molecules at once: bounds the (chunk, 29, 29, 3) differences to 80 MB

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Molecules:
    """Molecules, padded to 29 atoms."""

    # Of each atom, shape ``(n, 29, 11)``: one-hot H, C, N, O, F; atomic number; four zeros
    # (aromatic, sp, sp2, sp3: PyG's QM9 leaves them at zero too, see https://github.com/pyg-
    # team/pytorch_geometric/issues/8370); number of bonded hydrogens
    features: Tensor
    positions: Tensor  # in Å, shape ``(n, 29, 3)``
    bonds: Tensor  # 0 for none, 1 + bond type otherwise, shape ``(n, 29, 29)``, uint8, symmetric
    targets: Tensor  # shape ``(n, 11)``, float64, in the units of :func:`unit_of`
    source: str  # where they are from


def unit_of(name: str) -> str:
    """Unit of a target."""
    return "meV" if name in MEV else next(t.unit for t in TARGETS if t.name == name)


def load_molecules(count: int, *, seed: int = 0) -> Molecules:
    """A random choice of QM9's molecules.

    They are read from the folder of the environment variable ``BAYESAGG_DATA`` where it is set, and
    from ``qm9pack`` otherwise. U0, U, H and G are atomisation energies, as in the paper's protocol.

    Args:
        count: How many of the 130,831.
        seed: Seed of the choice.

    Raises:
        DataUnavailableError: If the folder has no QM9, or ``qm9pack`` is not installed.
        ValueError: If there are not that many molecules.
    """
    if not 1 <= count <= TOTAL_MOLECULES:
        raise ValueError(f"QM9 has {TOTAL_MOLECULES} molecules, {count} were asked for")
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        return _from_torch_geometric(Path(folder).expanduser(), count, seed)
    return _from_package(count, seed)


def _choice(total: int, count: int, seed: int) -> Integers:
    return np.random.default_rng(seed).permutation(total)[:count]


def _from_package(count: int, seed: int) -> Molecules:
    frame = read_frame("SMILES")
    frame = frame.iloc[_choice(len(frame), count, seed)]
    numbers, positions = parse_geometry(frame["Elements"], frame["XYZ_Ang"])
    bonds = find_bonds(list(frame["SMILES"]), numbers, positions)
    targets = frame[[target.column for target in TARGETS]].to_numpy(np.float64)
    return Molecules(
        torch.from_numpy(atom_features(numbers, bonds)),
        torch.from_numpy(positions).float(),
        torch.from_numpy(bonds),
        torch.from_numpy(paper_units(targets, numbers)),
        "qm9pack",
    )


def paper_units(targets: Floats, numbers: Integers) -> Floats:
    """Energies in meV, and those of atomisation in place of U0, U, H and G.

    Args:
        targets: As shipped, in the order and units of :data:`examples.data.qm9.TARGETS`.
        numbers: Atomic numbers, shape ``(n, 29)``, 0 for padding.
    """
    counts = np.stack([(numbers == z).sum(1) for z in ATOMIC_NUMBERS.values()], 1)
    result = targets.copy()
    for k, target in enumerate(TARGETS):
        if target.name in _ATOM_ENERGIES:
            result[:, k] -= counts @ np.array(_ATOM_ENERGIES[target.name])
        if target.name in MEV:
            result[:, k] *= _MEV_PER_HARTREE
    return result


def atom_features(numbers: Integers, bonds: Bytes) -> npt.NDArray[np.float32]:
    """Features of each atom, shape ``(n, 29, 11)``; 0 for padding."""
    result = np.zeros((*numbers.shape, NODE_FEATURES), np.float32)
    for k, number in enumerate(ATOMIC_NUMBERS.values()):
        result[..., k] = numbers == number
    result[..., 5] = numbers
    result[..., 10] = ((bonds > 0) & (numbers == 1)[:, None, :]).sum(2)
    return result


def find_bonds(smiles: list[str], numbers: Integers, positions: Floats) -> Bytes:
    """Bonds of each molecule, shape ``(n, 29, 29)``: 0, or 1 + bond type.

    Between heavy atoms they are those of the SMILES, whose atoms are in the order of the geometry,
    and a hydrogen's is to the nearest heavy atom. Where the SMILES does not fit the geometry (six
    of QM9's molecules), heavy atoms closer than 1.7 Å have a single bond.

    Args:
        smiles: One per molecule.
        numbers: Atomic numbers, shape ``(n, 29)``, 0 for padding.
        positions: In Å, shape ``(n, 29, 3)``.
    """
    bonds = np.zeros((*numbers.shape, MAX_ATOMS), np.uint8)
    for first in range(0, len(numbers), _CHUNK):
        part = slice(first, first + _CHUNK)
        xyz = positions[part].astype(np.float32)
        distance = np.linalg.norm(xyz[:, :, None] - xyz[:, None], axis=-1)
        heavy = numbers[part] > 1
        molecule, hydrogen = np.nonzero(numbers[part] == 1)
        partner = np.where(heavy[:, None, :], distance, np.inf)[molecule, hydrogen].argmin(1)
        bonds[part][molecule, hydrogen, partner] = 1
        bonds[part][molecule, partner, hydrogen] = 1
        for i, text in enumerate(smiles[part]):
            _bond_heavy_atoms(bonds[first + i], text, numbers[first + i], distance[i])
    return bonds


def parse_smiles(text: str) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Element of each heavy atom, in order, and bonds: two of their places, and the order 1 to 3.

    Raises:
        ValueError: If rdkit cannot read the string, or it is not in Kekulé form, as QM9's are.
    """
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(text, sanitize=False)  # bonds stay as they are written
    atoms = list(molecule.GetAtoms()) if molecule else []
    if not atoms or any(atom.GetIsAromatic() for atom in atoms):
        raise ValueError(f"cannot read the SMILES {text!r}")
    bonds = [
        (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), int(b.GetBondTypeAsDouble()))
        for b in molecule.GetBonds()
    ]
    return [atom.GetSymbol() for atom in atoms], bonds


def _bond_heavy_atoms(bonds: Bytes, smiles: str, numbers: Integers, distance: Floats) -> None:
    """Enter the bonds between the heavy atoms of a molecule into ``bonds``, ``(29, 29)``."""
    elements, found = parse_smiles(smiles)
    places = np.flatnonzero(numbers > 1)
    fits = [ATOMIC_NUMBERS[element] for element in elements] == numbers[places].tolist()
    if fits and found:
        first, second, order = np.array(found).T
        first, second = places[first], places[second]
        fits = bool(distance[first, second].max() < _MISFIT)
    elif fits:
        return
    if not fits:
        close = np.argwhere(np.triu(distance[np.ix_(places, places)] < _LONGEST_BOND, 1))
        first, second = places[close].T
        order = np.ones(len(close), np.uint8)
    bonds[first, second] = bonds[second, first] = order


def _from_torch_geometric(folder: Path, count: int, seed: int) -> Molecules:
    path = folder / _PYG_FILE
    if not path.exists():
        raise DataUnavailableError(
            f"there is no {_PYG_FILE} in {folder}, the folder of --data-dir or {DATA_VARIABLE}; "
            "download it with: "
            f"python -c \"from torch_geometric.datasets import QM9; QM9('{folder}/QM9')\"; "
            "or leave the folder out for the molecules that come with qm9pack"
        )
    from torch_geometric.io import fs  # takes seconds to import

    data, slices = fs.torch_load(str(path))[:2]
    starts = slices["x"]
    sizes = starts.diff()
    rows = torch.from_numpy(_choice(len(sizes), min(count, len(sizes)), seed))
    if len(rows) < count or int(sizes.max()) > MAX_ATOMS:
        raise ValueError(
            f"{path} has {len(sizes)} molecules of at most {int(sizes.max())} atoms; "
            f"{count} of at most {MAX_ATOMS} were asked for"
        )
    occupied = torch.arange(MAX_ATOMS) < sizes[:, None]
    features = torch.zeros(len(sizes), MAX_ATOMS, NODE_FEATURES)
    positions = torch.zeros(len(sizes), MAX_ATOMS, 3)
    features[occupied], positions[occupied] = data["x"].float(), data["pos"].float()
    bonds = torch.zeros(len(sizes), MAX_ATOMS, MAX_ATOMS, dtype=torch.uint8)
    molecule = torch.arange(len(sizes)).repeat_interleave(slices["edge_index"].diff())
    first, second = data["edge_index"]
    bonds[molecule, first, second] = data["edge_attr"].argmax(1).to(torch.uint8) + 1
    energy = torch.tensor([1000.0 if target.name in MEV else 1.0 for target in TARGETS])
    targets = data["y"][:, _PYG_COLUMNS].double() * energy
    return Molecules(
        features[rows], positions[rows], bonds[rows], targets[rows], "torch_geometric.datasets.QM9"
    )


def bond_one_hot(bonds: Tensor) -> Tensor:
    """Type of each bond as PyG has it: zeros for none, one-hot otherwise, shape ``(…, 4)``."""
    return F.one_hot(bonds.long(), BOND_TYPES + 1)[..., 1:].float()

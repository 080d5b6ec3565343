"""Batches of molecular graphs, made from padded tensors as they are needed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from examples.data.molecules import BOND_TYPES, Molecules, bond_one_hot

Edges = Literal["complete", "bonds"]
EDGE_FEATURES = BOND_TYPES + 1


@dataclass(frozen=True)
class GraphBatch:
    """Graphs as one, under the names of ``torch_geometric.data.Batch``."""

    x: Tensor  # features of the atoms, shape ``(N, 11)``, molecule after molecule
    edge_index: Tensor  # source and target of each edge, shape ``(2, E)``, by ascending target
    edge_attr: Tensor  # bond type, one-hot, and distance in Å, shape ``(E, 5)``
    batch: Tensor  # graph of each atom, shape ``(N,)``


class GraphPart:
    """Graphs and targets that batches are taken from.

    Args:
        molecules: Molecules of all parts.
        rows: Those of this part.
        y: Standardised targets of this part, shape ``(n, K)``.
        edges: ``complete``: between all pairs of atoms; ``bonds``: bonds only.
    """

    chunk = 250  # graphs at once in evaluation: the network keeps 600 kB per graph and round

    def __init__(self, molecules: Molecules, rows: Tensor, y: Tensor, edges: Edges) -> None:
        self._features, self._positions = molecules.features[rows], molecules.positions[rows]
        self._bonds, self._edges = molecules.bonds[rows], edges
        self.y = y

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self.y)

    def to(self, device: str) -> GraphPart:
        """The part on a device, where its batches are made too."""
        moved = copy.copy(self)
        for name in ("_features", "_positions", "_bonds", "y"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def batch(self, rows: Tensor) -> tuple[GraphBatch, Tensor]:
        """Graphs and targets of the given rows."""
        rows = rows.to(self.y.device)
        features, bonds = self._features[rows], self._bonds[rows]
        occupied = features[..., 5] > 0  # by atomic number
        linked = bonds > 0
        if self._edges == "complete":
            linked = occupied[:, :, None] & occupied[:, None, :]
            linked.diagonal(dim1=1, dim2=2).fill_(False)
        # Links are symmetric: with the target first, edges come sorted by target.
        graph, target, source = linked.nonzero().unbind(1)
        positions = self._positions[rows]
        distance = (positions[graph, source] - positions[graph, target]).norm(dim=1, keepdim=True)
        attributes = torch.cat([bond_one_hot(bonds[graph, source, target]), distance], 1)
        number = occupied.flatten().cumsum(0).view_as(bonds[..., 0]) - 1
        return GraphBatch(
            x=features[occupied],
            edge_index=torch.stack([number[graph, source], number[graph, target]]),
            edge_attr=attributes,
            batch=occupied.nonzero()[:, 0],
        ), self.y[rows]

"""QM9 by the paper's message-passing network: 11 regressions on molecular graphs."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from examples import message_passing
from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.networks import SeparateNets, TaskNet
from examples.comparison.tasks import Task
from examples.data import molecules, split_indices
from examples.data.molecules import Molecules, bond_one_hot, load_molecules, unit_of
from examples.data.qm9 import TARGETS, TOTAL_MOLECULES
from examples.message_passing import FactoredMessagePassing
from examples.training import TrainSettings

Edges = Literal["complete", "bonds"]
_SIZES = 64, 128  # dimensions, and the hidden layer of the edge network: the paper's
_MOLECULES, _HELD_OUT = 2_000, 10_000  # default; largest validation and test part, the paper's
_TASKS = tuple(Task(t.name, "regression", "mae", unit_of(t.name)) for t in TARGETS)


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


def network(tasks: Sequence[Task], sizes: tuple[int, int] | None = None) -> TaskNet:
    """Build the message-passing network with a linear head."""
    geometric = importlib.import_module("torch_geometric.nn")  # takes seconds
    dim, hidden = sizes or _SIZES
    return TaskNet(FactoredMessagePassing(dim, geometric, hidden), dim, tasks)


def load(
    count: int | None = None,
    max_train: int | None = None,
    edges: Edges = "complete",
    sizes: tuple[int, int] | None = None,
) -> Benchmark:
    """Read random molecules; validation and test part are a tenth each, at most 10,000.

    Graphs are complete, as in the paper, or of the bonds. Sizes are those of the network.
    """
    count = count or _MOLECULES
    found = load_molecules(count)
    held_out = min(_HELD_OUT, count // 10)
    share = (held_out + 0.5) / count  # of which split_indices takes the whole part
    train, val, test = split_indices(count, val_fraction=share, test_fraction=share, seed=0)
    train = train[:max_train]
    mean, scale = found.targets[train].mean(0), found.targets[train].std(0)
    y = ((found.targets - mean) / scale).float()

    def part(rows: Tensor) -> GraphPart:
        return GraphPart(found, rows, y[rows], edges)

    return Benchmark(
        _TASKS,
        *map(part, (train, val, test)),
        scale=scale.float(),
        model=partial(network, _TASKS, sizes),
        single_task=partial(SeparateNets.of, _TASKS, partial(network, sizes=sizes)),
        network=(
            f"message passing (NNConv, GRU, Set2Set), {(sizes or _SIZES)[0]} dimensions, "
            f"{edges} graphs"
        ),
        version={
            "source": found.source,
            "molecules": count,
            "parts": [len(train), len(val), len(test)],
            "split_seed": 0,
            "edges": edges,
            "torch_geometric": importlib.metadata.version("torch_geometric"),
        },
    )


SOURCE = Source(
    title="QM9",
    load=load,
    settings=TrainSettings(epochs=10, batch_size=120),
    paper=paper_settings("qm9", "plateau"),
    preset="qm9",
    size=_MOLECULES,
    paper_size=TOTAL_MOLECULES,
    size_name="molecules",
    size_range=(100, TOTAL_MOLECULES),
    code=(message_passing, molecules),
)
_OWN = replace(SOURCE, paper=None, paper_size=None)
BONDS = replace(_OWN, title="QM9, bonds only", load=partial(load, edges="bonds"))
SMALL = replace(_OWN, title="QM9, a small network", load=partial(load, sizes=(32, 32)))

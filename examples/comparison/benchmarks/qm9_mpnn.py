"""QM9 by the paper's message-passing network: 11 regressions on molecular graphs."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from examples import message_passing
from examples.comparison.benchmark import Benchmark, Source, paper_settings
from examples.comparison.networks import SeparateNets, TaskNet
from examples.comparison.tasks import Task
from examples.data import graphs, molecules, split_indices
from examples.data.graphs import Edges, GraphPart
from examples.data.molecules import load_molecules, unit_of
from examples.data.qm9 import TARGETS, TOTAL_MOLECULES
from examples.message_passing import FactoredMessagePassing
from examples.training import TrainSettings

_DIM = 64
_MOLECULES, _HELD_OUT = 2_000, 10_000  # default; largest validation and test part, the paper's
_TASKS = tuple(Task(t.name, "regression", "mae", unit_of(t.name)) for t in TARGETS)


def network(tasks: Sequence[Task]) -> TaskNet:
    """Build the message-passing network with a linear head."""
    geometric = importlib.import_module("torch_geometric.nn")  # takes seconds
    return TaskNet(FactoredMessagePassing(_DIM, geometric), _DIM, tasks)


def load(
    count: int | None = None, max_train: int | None = None, edges: Edges = "complete"
) -> Benchmark:
    """Read random molecules; validation and test part are a tenth each, at most 10,000.

    Graphs are complete, as in the paper, or of the bonds.
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
        model=partial(network, _TASKS),
        single_task=lambda: SeparateNets([network([task]) for task in _TASKS], _TASKS),
        network=f"message passing (NNConv, GRU, Set2Set), {_DIM} dimensions, {edges} graphs",
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
    code=(message_passing, graphs, molecules),
)
BONDS = replace(
    SOURCE, title="QM9, bonds only", load=partial(load, edges="bonds"), paper=None, paper_size=None
)

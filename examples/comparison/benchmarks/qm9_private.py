"""QM9 from descriptors by networks with private layers: a tower per task, and experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from examples.comparison import private
from examples.comparison.benchmark import Benchmark
from examples.comparison.benchmarks import qm9
from examples.comparison.private import Experts, PrivateNet, Trunk

_WIDTHS, _TOWER = (256, 256, 64), 32
Body = Callable[[int, Sequence[int], int], nn.Module]


def _load(body: Body, name: str, molecules: int | None, max_train: int | None) -> Benchmark:
    """Data and single-task models of ``qm9``: all networks are measured by the same models."""
    data = qm9.load(molecules, max_train)
    inputs, tasks = int(data.version["inputs"]), data.tasks

    def model() -> PrivateNet:
        return PrivateNet(body(inputs, _WIDTHS, len(tasks)), _WIDTHS[-1], _TOWER, tasks)

    return replace(data, model=model, network=f"{name}, towers of {_TOWER}, ELU, linear heads")


def load_towers(molecules: int | None = None, max_train: int | None = None) -> Benchmark:
    """A trunk, and a tower for each task.

    Raises:
        DataUnavailableError: If ``qm9pack`` is not installed.
    """
    return _load(Trunk, "MLP 256-256-64", molecules, max_train)


def load_experts(molecules: int | None = None, max_train: int | None = None) -> Benchmark:
    """Four experts, and a gate and a tower for each task.

    Raises:
        DataUnavailableError: If ``qm9pack`` is not installed.
    """
    return _load(Experts, "MLP 256-256, 4 experts of 64, gates", molecules, max_train)


TOWERS = replace(
    qm9.SOURCE, title="QM9 proxy, towers", load=load_towers, common=False, code=(qm9, private)
)
EXPERTS = replace(TOWERS, title="QM9 proxy, experts", load=load_experts)

"""A step of every method of the comparisons on a network of the benchmark (the paper's Table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.presets import PAPER
from examples.benchmark.cases import Case
from examples.benchmark.measuring import Clock
from examples.benchmark.networks import make_workload
from examples.benchmark.parts import Row
from examples.comparison.benchmark import Benchmark
from examples.comparison.catalogue import Method, methods, more_methods
from examples.comparison.costs import measure_costs
from examples.comparison.tasks import Outputs, Task, criterion
from examples.training import Losses, TrainSettings


def method_rows(
    case: Case, rounds: int, names: list[str] | None = None, clock: Clock = "wall"
) -> list[Row]:
    """Time, ratio to linear scalarization and peak memory of a step of every method.

    Args:
        case: The network, with its tasks and ``step_batch`` random data.
        rounds: How often each method is timed; the methods take turns.
        names: Methods; ``None``: all that ``--methods all`` of a comparison means. Linear
            scalarization is always measured.
        clock: What time is.
    """
    settings = TrainSettings(batch_size=case.step_batch)
    costs = measure_costs(
        chosen(case, names), benchmark(case), settings, rounds=rounds, clock=clock
    )
    return [
        Row("methods", case.name, f"{name} {what}", value, unit)
        for name, cost in costs.items()
        for what, value, unit in (
            ("time", 1e3 * cost.seconds, "ms"),
            ("ratio", cost.ratio, "×"),
            ("peak", cost.peak_bytes / 1e6, "MB"),
        )
    ]


def chosen(case: Case, names: list[str] | None = None) -> Mapping[str, Method]:
    """Methods by name, linear scalarization first, the paper's with the preset of the case.

    Raises:
        ValueError: If there is no method of a name.
    """
    preset = case.name if case.name in PAPER else "utkface"
    every = methods(preset)
    known = every | more_methods(preset)
    for name in names or []:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(["ls", *(names or every)])}


def benchmark(case: Case) -> Benchmark:
    """The network and the random batch of a case, as a comparison wants them."""
    x, targets = make_workload(case).batches[0]
    columns = [y.float().reshape(case.step_batch, -1) for y in targets.values()]
    batch = _Batch(x, torch.cat(columns, 1), case.step_batch)
    tasks = [
        Task(head.name, "multiclass", "accuracy", classes=head.outputs)
        if head.kind == "multiclass"
        else Task(f"{head.name} {i}", head.kind, "mae" if head.kind == "regression" else "auroc")
        for head in case.tasks
        for i in range(1 if head.kind == "multiclass" else head.outputs)
    ]

    def losses(outputs: Outputs, y: Tensor) -> Losses:
        """From outputs by head of the case."""
        merged: dict[str, list[Tensor]] = {}
        for head in case.tasks:
            name = head.name if head.kind == "multiclass" else head.kind
            merged.setdefault(name, []).append(outputs[head.name])
        return criterion(tasks)({name: torch.cat(parts, 1) for name, parts in merged.items()}, y)

    return Benchmark(
        tuple(tasks),
        *(batch, batch, batch),
        scale=torch.ones(len(tasks)),
        model=lambda: make_workload(case).model,
        single_task=nn.Module,
        network=case.network,
        version={"shape": case.name},
        losses=losses,
    )


@dataclass(frozen=True)
class _Batch:
    """Data that are always the same batch."""

    x: Any
    y: Tensor
    count: int

    def __len__(self) -> int:
        return self.count

    def batch(self, rows: Tensor) -> tuple[Any, Tensor]:
        return self.x, self.y

"""A step of every method of the comparisons on a network of the benchmark (the paper's Table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.presets import PAPER
from examples.benchmark.models import MultiHead, Workload, make_workload
from examples.benchmark.report import Row
from examples.benchmark.shapes import Shape
from examples.benchmark.shapes import Task as Head
from examples.benchmark.timing import Clock
from examples.comparison.benchmark import Benchmark
from examples.comparison.catalogue import Method, methods, more_methods
from examples.comparison.costs import measure_costs
from examples.comparison.tasks import Metric, Outputs, Task
from examples.models import HeadGroup
from examples.training import TrainSettings

_MB = 1e6


def method_rows(
    shape: Shape, rounds: int, names: list[str] | None = None, clock: Clock = "wall"
) -> list[Row]:
    """Part 4: time, ratio to linear scalarization and peak memory of a step of every method.

    Args:
        shape: The network, with its tasks and ``step_batch`` random data.
        rounds: How often each method is timed; the methods take turns.
        names: Methods; ``None``: all that ``--methods all`` of a comparison means. Linear
            scalarization is always measured.
        clock: What time is.

    Raises:
        MissingDependencyError: The network needs a package that is not installed.
    """
    settings = TrainSettings(batch_size=shape.step_batch)
    costs = measure_costs(
        chosen(shape, names), benchmark(shape), settings, rounds=rounds, clock=clock
    )
    rows = []
    for name, cost in costs.items():
        rows += [
            Row("methods", shape.name, f"{name} time", 1e3 * cost.seconds, "ms"),
            Row("methods", shape.name, f"{name} ratio", cost.ratio, "×", note="to that of ls"),
            Row("methods", shape.name, f"{name} peak", cost.peak_bytes / _MB, "MB"),
        ]
    return rows


def chosen(shape: Shape, names: list[str] | None = None) -> Mapping[str, Method]:
    """Methods by name, linear scalarization first, the paper's with the preset of the shape.

    Raises:
        ValueError: If there is no method of a name.
    """
    preset = shape.name if shape.name in PAPER else "utkface"
    every = methods(preset)
    known = every | more_methods(preset)
    for name in names or []:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys(["ls", *(names or every)])}


def benchmark(shape: Shape) -> Benchmark:
    """The network and the random batch of a shape, as a comparison wants them."""
    workload = make_workload(shape)
    batch = _Batch(workload.x, _targets(workload, shape.tasks), shape.step_batch)
    tasks = _tasks(shape.tasks)
    return Benchmark(
        tasks=tasks,
        train=batch,
        val=batch,
        test=batch,
        scale=torch.ones(len(tasks)),
        model=lambda: _Network(make_workload(shape).model, shape.tasks),
        single_task=nn.Module,
        network=shape.backbone,
        version={"shape": shape.name},
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


class _Network(nn.Module):
    """The network of a shape, with outputs by kind as those of the comparisons."""

    def __init__(self, network: MultiHead, heads: tuple[Head, ...]) -> None:
        super().__init__()
        self.backbone, self.heads, self._heads = network.backbone, network.heads, heads

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The heads, in the order of the tasks."""
        groups = []
        for head in self._heads:
            module = self.heads[head.name]
            assert isinstance(module, nn.Linear)
            groups.append(HeadGroup(head.name, head.kind, module, _count(head)))
        return tuple(groups)

    def forward(self, x: Any) -> Outputs:
        """Outputs by kind; those of a multi-class task by its name."""
        h = self.backbone(x)
        found: dict[str, list[Tensor]] = {}
        for head in self._heads:
            name = head.name if head.kind == "multiclass" else head.kind
            found.setdefault(name, []).append(self.heads[head.name](h))
        return {name: torch.cat(parts, 1) for name, parts in found.items()}


def _count(head: Head) -> int:
    return 1 if head.kind == "multiclass" else head.outputs


def _tasks(heads: tuple[Head, ...]) -> tuple[Task, ...]:
    tasks: list[Task] = []
    for head in heads:
        if head.kind == "multiclass":
            tasks.append(Task(head.name, head.kind, "accuracy", classes=head.outputs))
            continue
        metric: Metric = "mae" if head.kind == "regression" else "auroc"
        tasks += [Task(f"{head.name} {i}", head.kind, metric) for i in range(head.outputs)]
    return tuple(tasks)


def _targets(workload: Workload, heads: tuple[Head, ...]) -> Tensor:
    """Targets of all tasks, one column each."""
    columns = [workload.targets[head.name] for head in heads]
    return torch.cat([c.float().unflatten(0, (len(c), -1)).flatten(1) for c in columns], 1)

"""The shapes that are measured: batch, feature dimension and tasks of each benchmark.

Batch sizes, task counts and feature dimensions are those of the paper's Section 5 and
Appendix B; ``small`` is a network so small that only overhead is left to measure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["regression", "binary", "multiclass"]
Layout = Literal["separate", "grouped"]


@dataclass(frozen=True)
class Task:
    """One head: ``outputs`` regressions or binary tasks, or one task of ``outputs`` classes."""

    name: str
    kind: Kind
    outputs: int
    s: float
    prior_variance: float


@dataclass(frozen=True)
class Shape:
    """One benchmark: B = ``batch``, d = ``dim``, its tasks and the targets it is held to.

    ``step_batch`` is the batch of the whole-step and memory measurements, smaller than ``batch``
    where a full batch of images would take minutes on a few cores. ``examples`` is the size of
    the training set, from which the memory that grows with an epoch is extrapolated.
    """

    name: str
    backbone: str
    batch: int
    dim: int
    tasks: tuple[Task, ...]
    examples: int
    step_batch: int
    min_speedup: float | None = None
    max_step_ratio: float | None = None
    max_extra_mb: float = 60.0

    def with_layout(self, layout: Layout) -> Shape:
        """Split heads of several regressions or binary tasks into one head per task, or not."""
        if layout == "grouped":
            return self
        return replace(self, tasks=tuple(part for task in self.tasks for part in _split(task)))


def _split(task: Task) -> tuple[Task, ...]:
    if task.kind == "multiclass" or task.outputs == 1:
        return (task,)
    return tuple(replace(task, name=f"{task.name}_{i}", outputs=1) for i in range(task.outputs))


def _small(name: str, tasks: tuple[Task, ...]) -> Shape:
    return Shape(name, "mlp", 64, 32, tasks, 10_000, 64, max_step_ratio=3.0)


_FOUR_REGRESSIONS = (Task("property", "regression", 4, 0.85, 1.0),)
_MIXTURE = (
    Task("property", "regression", 2, 0.5, 1.0),
    Task("flag", "binary", 1, 0.05, 1.0),
    Task("label", "multiclass", 5, 0.05, 1.0),
)
_UTKFACE = (
    Task("age", "regression", 1, 0.3, 5e-3),
    Task("gender", "binary", 1, 0.1, 5e-3),
    Task("ethnicity", "multiclass", 5, 0.1, 5e-3),
)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "qm9",
            "mpnn",
            120,
            64,
            (Task("property", "regression", 11, 0.85, 1.0),),
            110_000,
            120,
            min_speedup=200.0,
            max_step_ratio=1.05,
        ),
        Shape(
            "cifar_mtl",
            "cnn",
            128,
            160,
            (Task("superclass", "binary", 20, 5e-4, 5e-4),),
            45_000,
            128,
            min_speedup=200.0,
            max_step_ratio=1.03,
        ),
        Shape(
            "chestxray14",
            "resnet34",
            256,
            256,
            (Task("disease", "binary", 14, 5e-4, 5e-3),),
            78_468,
            16,
            min_speedup=200.0,
        ),
        Shape(
            "utkface",
            "resnet18",
            128,
            256,
            _UTKFACE,
            16_600,
            128,
            min_speedup=30.0,
            max_step_ratio=1.03,
        ),
        _small("small", _FOUR_REGRESSIONS),
        _small("small_mixture", _MIXTURE),
    )
}

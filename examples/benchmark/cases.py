"""What is measured: sizes, tasks and what each is held to.

Batch sizes, task counts and feature dimensions are those of the paper's Section 5 and Appendix B,
and of networks so small that only overhead is left to measure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.comparison.tasks import Kind


@dataclass(frozen=True)
class Task:
    """One head: ``outputs`` regressions or binary tasks, or one task of ``outputs`` classes."""

    name: str
    kind: Kind
    outputs: int = 1


@dataclass(frozen=True)
class Case:
    """A network with its tasks."""

    name: str  # of the case
    network: str  # one of :data:`examples.benchmark.networks.NETWORKS`
    batch: int  # data of the paper's step, and of the aggregation by itself
    dim: int  # features of every head
    tasks: tuple[Task, ...]  # one head each
    step_batch: int  # data of a whole step, fewer where a full batch would take minutes
    max_operators: int | None = None  # more than a plain step has
    # Time of a step to that of a plain one, by rule
    max_ratio: dict[str, float] = field(default_factory=dict)
    # Of the aggregation over the formulas as printed; ``None``: not measured
    min_speedup: float | None = None
    turn: int = 1  # steps in a row, so that work that is not done in every step is in the mean
    device: str = "cpu"  # where steps are taken

    @property
    def small(self) -> bool:
        """Whether a step takes milliseconds."""
        return self.network in ("mlp", "mmoe")

    @property
    def rules(self) -> tuple[str, ...]:
        """The paper's rule needs one tensor that all heads read."""
        return ("likelihood",) if self.network == "mmoe" else ("likelihood", "paper")


def several(kind: Kind, count: int) -> tuple[Task, ...]:
    """Heads of one output each."""
    return tuple(Task(f"{kind}_{i}", kind) for i in range(count))


def _mlp(
    name: str, tasks: tuple[Task, ...], ratio: float | None, dim: int = 32, **more: int
) -> Case:
    aims = {} if ratio is None else {"likelihood": ratio}
    if name == "mixture":
        aims["paper"] = 4.0
    return Case(name, "mlp", 64, dim, tasks, 64, max_ratio=aims, turn=40, **more)


def _mmoe(count: int) -> Case:
    tasks = several("regression", count - count // 2) + several("binary", count // 2)
    return Case(f"mmoe_{count}", "mmoe", 64, 32, tasks, 64, turn=2 if count > 50 else 10)


_AGE_GENDER_ETHNICITY = (
    Task("age", "regression"),
    Task("gender", "binary"),
    Task("ethnicity", "multiclass", 5),
)
_MIXTURE = (*several("regression", 2), Task("flag", "binary"), Task("label", "multiclass", 5))
_LARGE = {"likelihood": 1.02}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _mlp("regressions", several("regression", 4), 1.6, max_operators=250),
        _mlp("mixture", _MIXTURE, 2.0, max_operators=400),
        _mlp("binaries", several("binary", 20), None, max_operators=700),
        _mlp("wide_regression", (Task("property", "regression", 1000),), 2.5),
        _mlp("wide_classes", (Task("label", "multiclass", 1000),), 2.5),
        _mlp("d512", several("regression", 4), 3.0, dim=512),
        *map(_mmoe, (2, 11, 100)),
        Case("qm9", "mpnn", 120, 64, several("regression", 11), 120, None, _LARGE, 200.0),
        Case("cifar_mtl", "cnn", 128, 160, several("binary", 20), 128, None, _LARGE, 200.0),
        Case("utkface", "resnet18", 128, 256, _AGE_GENDER_ETHNICITY, 128, None, _LARGE, 30.0),
        Case("chestxray14", "resnet34", 256, 256, several("binary", 14), 16, None, {}, 200.0),
    )
}

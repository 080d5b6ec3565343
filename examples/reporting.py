"""Tables and files of a comparison of multi-task methods with single-task models."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bayesagg.metrics import delta_m, mean_rank

SINGLE_TASK = "single-task"


@dataclass(frozen=True)
class Run:
    """One method trained once.

    Attributes:
        method: Its name, :data:`SINGLE_TASK` for the single-task models.
        seed: Seed of weights and batches.
        settings: What the method adds to the settings that all share.
        test: Criterion of each task on the test part, in the units of the data set, length K.
        val: The same on the validation part.
        refit: Test criterion with the heads refit to the training part, length K.
        seconds: Wall time of the training.
        seconds_per_step: Wall time of an optimizer step.
        weights: Mean share of each task in the weights, per epoch; empty where there are none.
    """

    method: str
    seed: int
    settings: dict[str, Any]
    test: list[float]
    val: list[float]
    refit: list[float]
    seconds: float
    seconds_per_step: float
    weights: list[list[float]]


@dataclass(frozen=True)
class Row:
    """One method over its seeds; all Δm in percent, against the single-task mean over seeds.

    Attributes:
        method: Its name.
        test: Mean test criterion per task, length K.
        delta: Δm of each seed.
        delta_val: Δm on the validation part, mean over seeds.
        delta_refit: Δm with refit heads against single-task models with refit heads, mean.
        rank: Mean rank among the multi-task methods; ``None`` for the single-task models.
        seconds_per_step: Mean over seeds.
        weights: Mean share of each task, per epoch.
    """

    method: str
    test: list[float]
    delta: list[float]
    delta_val: float
    delta_refit: float
    rank: float | None
    seconds_per_step: float
    weights: list[list[float]]


def _task_means(runs: Sequence[Run], field: str) -> list[float]:
    return [mean(values) for values in zip(*(getattr(run, field) for run in runs), strict=True)]


def summarise(runs: Sequence[Run]) -> list[Row]:
    """Average the runs over seeds and compare each method with the single-task models.

    Args:
        runs: All runs, those of :data:`SINGLE_TASK` among them; a lower criterion is better.

    Returns:
        A row per method, in order of first appearance.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    single = {name: _task_means(by_method[SINGLE_TASK], name) for name in ("test", "val", "refit")}
    tests = {method: _task_means(group, "test") for method, group in by_method.items()}
    ranked = [method for method in by_method if method != SINGLE_TASK]
    ranks = dict(zip(ranked, mean_rank([tests[m] for m in ranked]).tolist(), strict=True))
    return [
        Row(
            method=method,
            test=tests[method],
            delta=[delta_m(run.test, single["test"]) for run in group],
            delta_val=mean(delta_m(run.val, single["val"]) for run in group),
            delta_refit=mean(delta_m(run.refit, single["refit"]) for run in group),
            rank=ranks.get(method),
            seconds_per_step=mean(run.seconds_per_step for run in group),
            weights=[
                [mean(share) for share in zip(*epoch, strict=True)]
                for epoch in zip(*(run.weights for run in group), strict=True)
            ],
        )
        for method, group in by_method.items()
    ]


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def task_table(
    rows: Sequence[Row], labels: dict[str, str], tasks: Sequence[str], units: Sequence[str]
) -> str:
    """Table of the test criterion: a line per task with its unit, a column per method."""
    header = ["test MAE", *(labels[row.method] for row in rows)]
    lines = [
        [f"{task} [{unit}]", *(f"{row.test[k]:.4g}" for row in rows)]
        for k, (task, unit) in enumerate(zip(tasks, units, strict=True))
    ]
    return _grid(header, lines)


def spread(values: Sequence[float]) -> str:
    """Mean and, from two values on, sample standard deviation, to one decimal."""
    text = f"{round(mean(values), 1) + 0.0:.1f}"  # + 0.0 turns -0.0 into 0.0
    return text if len(values) < 2 else f"{text} ± {stdev(values):.1f}"


def summary_table(rows: Sequence[Row], labels: dict[str, str]) -> str:
    """Table of Δm, mean rank and time per step: a line per method."""
    header = ["method", "Δm [%]", "Δm, refit heads [%]", "mean rank", "ms per step"]
    lines = [
        [
            labels[row.method],
            spread(row.delta),
            spread([row.delta_refit]),
            "" if row.rank is None else f"{row.rank:.2f}",
            f"{1e3 * row.seconds_per_step:.1f}",
        ]
        for row in rows
    ]
    return _grid(header, lines)


def write_csv(
    path: Path,
    runs: Sequence[Run],
    settings: dict[str, Any],
    tasks: Sequence[str],
    units: Sequence[str],
) -> None:
    """Write a line per method, seed and task, each with every setting."""
    with path.open("w", newline="", encoding="utf-8") as file:
        measured = ["method", "seed", "task", "unit", "test", "val", "test_refit_head"]
        times = ["seconds_per_step", "train_seconds", "method_settings"]
        writer = csv.DictWriter(file, [*measured, *times, *settings])
        writer.writeheader()
        for run in runs:
            for k, (task, unit) in enumerate(zip(tasks, units, strict=True)):
                writer.writerow(
                    {
                        "method": run.method,
                        "seed": run.seed,
                        "task": task,
                        "unit": unit,
                        "test": run.test[k],
                        "val": run.val[k],
                        "test_refit_head": run.refit[k],
                        "seconds_per_step": run.seconds_per_step,
                        "train_seconds": run.seconds,
                        "method_settings": json.dumps(run.settings),
                        **settings,
                    }
                )


def write_json(
    path: Path,
    runs: Sequence[Run],
    rows: Sequence[Row],
    settings: dict[str, Any],
    tasks: Sequence[str],
    units: Sequence[str],
) -> None:
    """Write settings, every run and the summary over seeds."""
    content = {
        "settings": settings,
        "tasks": [{"name": t, "unit": u} for t, u in zip(tasks, units, strict=True)],
        "summary": [asdict(row) for row in rows],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

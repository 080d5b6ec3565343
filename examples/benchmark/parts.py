"""The three parts of the benchmark, each as rows of a report."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from examples.benchmark import aggregation, memory
from examples.benchmark.report import Row, at_least, at_most
from examples.benchmark.shapes import Shape
from examples.benchmark.steps import time_steps
from examples.benchmark.timing import Clock, interleave, median_ratio, quartiles

_MB = 1e6
_LIBRARY_CALLS = 20


def aggregation_rows(shape: Shape, rounds: int, samples: int, clock: Clock = "wall") -> list[Row]:
    """Part 1: the aggregation alone, library against the formulas as printed, B = ``batch``."""
    problem = aggregation.make_problem(shape)
    single = aggregation.make_problem(shape, torch.float32)
    arms: dict[str, Callable[[], Tensor]] = {
        "library": lambda: aggregation.run_library(problem),
        "float32 library": lambda: aggregation.run_library(single),
        "literal": lambda: aggregation.run_literal(problem, samples),
    }
    sampled = any(task.kind != "regression" for task in shape.tasks)
    if sampled:
        arms["diagonal"] = lambda: aggregation.run_literal(problem, samples, dense=False)
    ours, theirs = arms["library"]().float(), arms["literal"]()
    difference = 100 * float((ours - theirs).norm() / theirs.norm())
    times = interleave(
        arms,
        rounds=rounds,
        calls=dict.fromkeys(("library", "float32 library"), _LIBRARY_CALLS),
        clock=clock,
    )

    part, name = "aggregation", shape.name
    rows = [Row(part, name, f"{arm} time", 1e3 * median(times[arm]), "ms") for arm in arms]
    speedup = median_ratio(times["literal"], times["library"])
    target, passed = at_least(shape.min_speedup, speedup)
    note = _spread(times["literal"], times["library"])
    rows.append(Row(part, name, "speedup", speedup, "×", target, passed, note))
    value = median_ratio(times["literal"], times["float32 library"])
    note = "with dtype=torch.float32, the literal arm's, in place of the default float64"
    rows.append(Row(part, name, "speedup in float32", value, "×", note=note))
    if sampled:
        value = median_ratio(times["diagonal"], times["library"])
        note = "over Eq. 11 with E[g²] in place of the dense E[g gᵀ]"
        rows.append(Row(part, name, "speedup over diagonal", value, "×", note=note))
    note = f"error of {samples} samples" if sampled else "closed form in both"
    rows.append(Row(part, name, "difference of results", difference, "%", note=note))
    return rows


def step_rows(shape: Shape, rounds: int, clock: Clock = "wall") -> list[Row]:
    """Part 2: a whole training step against plain linear scalarization, B = ``step_batch``."""
    times = time_steps(shape, rounds, clock)
    batch = f"batch {shape.step_batch}"
    if shape.step_batch < shape.batch:
        batch += f" (the paper's is {shape.batch})"
    rows = [
        Row("step", shape.name, f"{arm} time", 1e3 * median(times[arm]), "ms", note=batch)
        for arm in times
    ]
    for arm in ("default", "paper"):
        ratio = median_ratio(times[arm], times["plain"])
        target, passed = at_most(shape.max_step_ratio, ratio)
        note = _spread(times[arm], times["plain"])
        rows.append(Row("step", shape.name, f"{arm} ratio", ratio, "×", target, passed, note))
        extra = median(a - b for a, b in zip(times[arm], times["plain"], strict=True))
        rows.append(Row("step", shape.name, f"{arm} extra time", 1e3 * extra, "ms"))
    return rows


def _spread(numerator: list[float], denominator: list[float]) -> str:
    low, high = quartiles(numerator, denominator)
    return f"quartiles {low:.4g}–{high:.4g} of {len(numerator)} rounds"


def memory_rows(shape: Shape, rss_threads: int | None) -> list[Row]:
    """Part 3: peak memory beyond that of the plain step; ``rss_threads`` asks for a cross-check."""
    plain = memory.measure(shape, "plain")
    rows = [Row("memory", shape.name, "plain peak", plain.step_peak / _MB, "MB")]
    for arm in ("default", "paper"):
        rows += _memory_of(arm, shape, plain)
    if rss_threads is not None:
        sizes = {arm: memory.peak_rss(shape, arm, rss_threads) for arm in memory.ARMS}
        less = sizes.pop("plain")
        note = "fresh processes, with the allocator's slack"
        for arm, size in sizes.items():
            if size is not None and less is not None:
                extra = (size - less) / _MB
                rows.append(
                    Row("memory", shape.name, f"{arm} extra resident size", extra, "MB", note=note)
                )
    return rows


def _memory_of(arm: str, shape: Shape, plain: memory.MemoryUse) -> list[Row]:
    part, name, ours = "memory", shape.name, memory.measure(shape, arm)
    extra = (ours.step_peak - plain.step_peak) / _MB
    target, passed = at_most(shape.max_extra_mb, extra, "MB")
    note = f"batch {shape.step_batch}"
    rows = [Row(part, name, f"{arm} extra peak of a step", extra, "MB", target, passed, note)]

    growth = max(0, ours.step_growth - plain.step_growth) / _MB
    extra += growth * shape.examples / shape.step_batch
    target, passed = at_most(shape.max_extra_mb, extra, "MB")
    note = f"with what {shape.examples} examples leave behind"
    rows.append(Row(part, name, f"{arm} extra peak, last step", extra, "MB", target, passed, note))
    assert ours.epoch_end_peak is not None
    over = (ours.epoch_end_peak - plain.step_peak) / _MB
    note = "negative: below the peak of a plain step"
    rows.append(Row(part, name, f"{arm} end of epoch", over, "MB", note=note))
    return rows

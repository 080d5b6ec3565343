"""The parts of the benchmark, and their rows: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from examples.benchmark import aggregation, measuring
from examples.benchmark.cases import Case
from examples.benchmark.networks import Arm, arms, make_step

MAX_EXTRA_MB, MAX_SYNCHRONISATIONS = 60.0, 1


@dataclass(frozen=True)
class Row:
    """One measured quantity, with what it should be at most, or at least."""

    part: str
    shape: str
    quantity: str
    value: float
    unit: str = ""
    most: float | None = None
    least: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """As it is printed."""
        bounds = (("≤", self.most), ("≥", self.least))
        aim = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        verdict = ("pass" if self.passed else "FAIL") if aim else ""
        value = f"{self.value:.4g} {self.unit}".strip()
        return [self.part, self.shape, self.quantity, value, aim, verdict, self.note]

    @property
    def passed(self) -> bool:
        """Whether the value is within its bounds."""
        least = self.value if self.least is None else self.least
        return least <= self.value <= (self.value if self.most is None else self.most)


def markdown(rows: list[Row]) -> str:
    """A Markdown table of the rows, padded so that it reads as plain text too."""
    header = ["part", "shape", "quantity", "value", "aim", "verdict", "note"]
    cells = [header, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write(path: Path, rows: list[Row], setting: Mapping[str, object]) -> None:
    """Write rows and settings to a ``.json`` file."""
    content = {"setting": dict(setting), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def line(row: Row) -> str:
    """One row as it is printed while the benchmark runs."""
    return "  ".join(cell for cell in row.cells() if cell)


def count_rows(case: Case) -> list[Row]:
    """Operator calls and looks at the device of a step beyond those of a plain one."""
    plain, *others = ((arm.name, measuring.counts(make_step(case, arm).run)) for arm in arms(case))
    aims = {"operators": case.max_operators, "synchronisations": MAX_SYNCHRONISATIONS}
    rows = []
    for name, found in others:
        for what, value, of_plain in zip(aims, found, plain[1], strict=True):
            shown = {"most": aims[what], "note": f"{of_plain} of a plain step"}
            rows.append(Row("counts", case.name, f"{name}: {what}", value - of_plain, **shown))
    return rows


def time_rows(case: Case, rounds: int, clock: measuring.Clock = "wall") -> list[Row]:
    """Time of a step to that of a plain one, B = ``step_batch``; all arms take turns."""
    steps = {arm: make_step(case, arm) for arm in arms(case)}
    runs = {arm.name: step.run for arm, step in steps.items()}
    times = measuring.interleave(runs, rounds=range(rounds), calls=case.turn, clock=clock)
    plain = times["plain"]
    note = f"batch {case.step_batch}"
    if case.step_batch < case.batch:
        note += f" (the paper's is {case.batch})"
    rows = [Row("time", case.name, "plain", 1e3 * median(plain), "ms", note=note)]
    for arm in list(steps)[1:]:
        ratio = measuring.median_ratio(times[arm.name], plain)
        low, high = measuring.quartiles(times[arm.name], plain)
        note = f"{1e3 * median(times[arm.name]):.4g} ms; quartiles {low:.4g}–{high:.4g}"
        aim = case.max_ratio.get(arm.rule or "")
        rows.append(Row("time", case.name, arm.name, ratio, "×", aim, note=note))
    return rows


def memory_rows(case: Case) -> list[Row]:
    """Peak memory of a step, and what the rules add to it."""
    plain = measuring.peak_bytes(lambda: make_step(case, Arm()).run) / 1e6
    rows = [Row("memory", case.name, "plain", plain, "MB", note=f"batch {case.step_batch}")]
    for rule in case.rules:
        extra = measuring.peak_bytes(lambda rule=rule: make_step(case, Arm(rule)).run) / 1e6 - plain
        rows.append(Row("memory", case.name, f"{rule}: extra", extra, "MB", MAX_EXTRA_MB))
    return rows


def aggregation_rows(
    case: Case, rounds: int, samples: int, clock: measuring.Clock = "wall"
) -> list[Row]:
    """The paper's aggregation by itself: the library against the formulas as printed."""
    problem = aggregation.make_problem(case)
    single = replace(problem, dtype=torch.float32)
    found: dict[str, Callable[[], Tensor]] = {
        "float64": lambda: aggregation.run_library(problem),
        "float32": lambda: aggregation.run_library(single),
        "literal": lambda: aggregation.run_literal(problem, samples),
    }
    ours, theirs = found["float64"]().float(), found["literal"]()
    difference = 100 * float((ours - theirs).norm() / theirs.norm())
    times = measuring.interleave(
        found, rounds=range(rounds), calls={"float64": 20, "float32": 20}, clock=clock
    )
    note = f"{1e3 * median(times['literal']):.4g} ms"
    if any(task.kind != "regression" for task in case.tasks):
        note += f", {samples} samples"
    rows = [Row("aggregation", case.name, "difference", difference, "%", note=f"literal: {note}")]
    for name, aim in (("float64", case.min_speedup), ("float32", None)):
        speedup = measuring.median_ratio(times["literal"], times[name])
        own = {"least": aim, "note": f"{1e3 * median(times[name]):.4g} ms"}
        rows.append(Row("aggregation", case.name, f"speedup, {name}", speedup, "×", **own))
    return rows

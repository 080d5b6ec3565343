"""Compare multi-task methods: ``python -m examples.compare BENCHMARK``; see its ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.comparison import rates, report
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import SINGLE_TASK, SINGLE_TASK_METHOD, methods
from examples.comparison.command import parse_arguments
from examples.comparison.costs import Cost, measure_costs
from examples.comparison.figure import plot_calibration, plot_comparison
from examples.comparison.pipeline import (
    ComparisonError,
    Outcome,
    Plan,
    execute,
    shared_settings,
)
from examples.comparison.runs import Store, load
from examples.data import DataUnavailableError


def write_all(folder: Path, plan: Plan, outcome: Outcome, costs: dict[str, Cost]) -> list[Path]:
    """Write tables, CSV, JSON and the figures; returns the files."""
    data, shared = load(plan.data), shared_settings(plan)
    labels = {name: method.label for name, method in plan.methods.items()}
    labels |= {"ls": "LS", SINGLE_TASK: SINGLE_TASK_METHOD.label}
    title = f"{SOURCES[plan.data.benchmark].title}: {len(data.train):,} training data"
    files = [folder / f"results.{suffix}" for suffix in ("md", "csv", "json", "png")]
    more = [
        *rates.rate_tables(outcome, labels, data),
        rates.best_table(outcome, labels, data, plan.reference),
        rates.pair_table(outcome, labels, data),
    ]
    text = report.page(title, plan, outcome, labels, shared, costs, more)
    files[0].write_text(text, encoding="utf-8")
    report.write_csv(files[1], outcome, data, shared)
    report.write_json(files[2], outcome, data, shared, costs)
    plot_comparison(files[3], outcome, labels, data.tasks, title)
    calibration = folder / "results-calibration.png"
    if plot_calibration(calibration, outcome, labels, data.tasks, title):
        files.append(calibration)
    curves = folder / "results-rates.png"
    if rates.plot_rates(curves, outcome, labels, title):
        files.append(curves)
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    options = parse_arguments(arguments)
    plan: Plan = options.plan
    torch.set_num_threads(1)  # as in the processes: results do not depend on --jobs
    try:
        load(plan.data)
        outcome = execute(plan, Store(options.output / "runs.jsonl"))
    except (DataUnavailableError, ComparisonError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    costs = {}
    if options.costs:
        measured = {"ls": methods("qm9")["ls"]} | dict(plan.methods)
        costs = measure_costs(measured, load(plan.data), plan.training)
    files = write_all(options.output, plan, outcome, costs)
    print(files[0].read_text(encoding="utf-8"))
    print("Written:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())

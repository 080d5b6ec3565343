"""Compare multi-task methods: ``python -m examples.compare BENCHMARK``; see its ``--help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.arguments import Parser, add_jobs, make_folder, positive, whole
from examples.comparison import rates, report
from examples.comparison.arms import add_methods, chosen_methods
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import (
    SINGLE_TASK,
    SINGLE_TASK_METHOD,
    Method,
    methods,
    more_methods,
    unsuited,
)
from examples.comparison.costs import Cost, measure_costs
from examples.comparison.figure import plot_calibration, plot_comparison
from examples.comparison.pipeline import ComparisonError, Outcome, Plan, execute, shared_settings
from examples.comparison.runs import Data, Store, load
from examples.data import DATA_VARIABLE, DataUnavailableError
from examples.training import OPTIMIZERS

_ABOUT = """
Trains every method on one benchmark with several seeds under the same conditions, optionally tuned
with the same number of trials each, and writes tables, a figure and every run. A command that is
stopped goes on where it was when it is started again: finished runs are not repeated. A search
goes on where its best learning rate is the lowest or the highest of those tried.
"""


_COUNT = whole(1)
_OF_PLAN = ("seeds", "trials", "search_seeds", "reference", "part", "device")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad argument ends the program with one line and status 2."""
    epilog = "The commands of the documentation are beside its figures: docs/default.md."
    parser = Parser("compare", _ABOUT, epilog=epilog)
    _add_what(parser)
    _add_how(parser)
    options = parser.parse_args(arguments)
    _check_size(options, parser)
    options.plan = _plan(options, parser)
    make_folder(options.output, parser)
    return options


def _adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    """``add_argument`` with the help second; by default of one whole number from 1."""

    def add(
        name: str, text: str, kind: Any = _COUNT, metavar: str | None = "N", **more: Any
    ) -> None:
        parser.add_argument(name, type=kind, metavar=metavar, help=text, **more)

    return add


def _add_what(parser: argparse.ArgumentParser) -> None:
    """Benchmark, size and methods."""
    add = _adder(parser)
    add("benchmark", f"one of: {', '.join(SOURCES)}", str, "BENCHMARK", choices=SOURCES)
    text = (
        f"all, none or some of: {', '.join(methods('qm9'))} (default: all); or of "
        f"{', '.join(more_methods('qm9'))}, which all leaves out"
    )
    add_methods(parser, ["all"], text)
    for name in ("molecules", "patients"):
        sources = {key: s for key, s in SOURCES.items() if s.size_name == name}
        low, high = next(iter(sources.values())).size_range
        sizes = ", ".join(f"{source.size} for {key}" for key, source in sources.items())
        text = f"{name}, chosen at random, {low} to {high} (default: {sizes})"
        add(f"--{name}", text, whole(low, high))
    add("--train-size", "use N data of the training part (default: all of it)", whole(10))
    text = "downloaded data sets, a subfolder each, in place of the environment variable "
    text += f"{DATA_VARIABLE} (default: what packages ship)"
    add("--data-dir", text, Path, "FOLDER")


def _add_how(parser: argparse.ArgumentParser) -> None:
    """Seeds, trials, training, processes and output."""
    add = _adder(parser)
    add("--seeds", "trainings of each method with its settings (default: 5)", default=5)
    add("--trials", "settings tried for each method; 1: the default (default: 1)", default=1)
    add("--search-seeds", "trainings of each trial (default: 1)", default=1)
    text = "methods that keep their default settings while the others are tuned"
    add("--untuned", text, str, "NAME", nargs="+", default=[])
    text = "method that the others' Δm are subtracted from in the table (default: ls)"
    add("--reference", text, str, "NAME", default="ls")
    text = "default settings and size: those for a small machine, or the published (default: small)"
    text += "; the options below override single ones"
    add("--protocol", text, str, None, choices=("small", "paper"), default="small")
    add("--epochs", "epochs of each training (default: the protocol's)")
    text = "of the single-task models, where a shorter training is yardstick enough (default: all)"
    add("--single-task-epochs", text)
    text = "steps of linear scalarization first, of all but the paper's rule (default: 50)"
    add("--warmup-steps", text, whole(0))
    add("--batch-size", "data per step (default: the protocol's)", whole(2))
    text = "of the methods (default: the protocol's); several: every method at each of them. The "
    text += "single-task models have the protocol's, so that all are measured by the same"
    add("--learning-rate", text, positive, nargs="+", default=[])
    text = "of the methods; sgd has momentum 0.9 (default: adam, as the single-task models)"
    add("--optimizer", text, str, None, choices=OPTIMIZERS)
    text = "part that the tables are of; with val, for choices, no run looks at the test part "
    add("--part", text + "(default: test)", str, None, choices=("test", "val"), default="test")
    add("--clip-norm", "largest norm of the gradient (default: no clipping)", positive)
    add("--device", "where to train, such as cuda (default: cpu)", str, default="cpu")
    add_jobs(parser)
    text = "measure time and memory of a step of every method, one after the other"
    parser.add_argument("--costs", action="store_true", help=text)
    text = "where runs, tables and figure are written (default: output/compare/BENCHMARK)"
    parser.add_argument("--output", "--out", type=Path, metavar="FOLDER", help=text)


def _check_size(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    source = SOURCES[options.benchmark]
    for name in ("molecules", "patients"):
        if getattr(options, name) is not None and source.size_name != name:
            parser.error(f"argument --{name}: {options.benchmark} has none; see --train-size")
    if options.trials > 1 and len(options.learning_rate) > 1:
        parser.error("argument --learning-rate: one, around which the --trials are, not several")
    if options.protocol == "paper" and source.paper is None:
        known = ", ".join(key for key, s in SOURCES.items() if s.paper is not None)
        parser.error(
            f"argument --protocol: no published settings for {options.benchmark}; there are some "
            f"for: {known}"
        )
    if options.data_dir is not None:
        if not options.data_dir.is_dir():
            parser.error(f"argument --data-dir: there is no folder '{options.data_dir}'")
        # Where worker processes find it too.
        os.environ[DATA_VARIABLE] = str(options.data_dir.resolve())
    if options.output is None:
        options.output = Path("output/compare") / options.benchmark


def _plan(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Plan:
    source = SOURCES[options.benchmark]
    chosen = _methods(options, parser)
    if options.reference not in chosen and options.reference != "ls":
        parser.error(f"argument --reference: {options.reference!r} is not among the methods")
    for name in options.untuned:
        if name not in chosen:
            parser.error(f"argument --untuned: {name!r} is not among the methods of the comparison")
    size = getattr(options, source.size_name) if source.size_name else None
    settings, default_size = source.settings, source.size
    if options.protocol == "paper":
        settings, default_size = source.paper, source.paper_size or source.size
    learning_rates = options.learning_rate or [settings.learning_rate]
    names = ("epochs", "batch_size", "clip_norm", "warmup_steps", "optimizer")
    given = {name: getattr(options, name) for name in names} | {"learning_rate": learning_rates[0]}
    single = {name: getattr(settings, name) for name in ("learning_rate", "optimizer")}
    if options.single_task_epochs:
        single["epochs"] = options.single_task_epochs
    return Plan(
        data=Data(options.benchmark, size or default_size, options.train_size),
        methods=chosen if len(learning_rates) == 1 else rates.at_rates(chosen, learning_rates),
        training=replace(settings, **{k: v for k, v in given.items() if v is not None}),
        untuned=tuple(options.untuned),
        workers=options.jobs,
        **{name: getattr(options, name) for name in _OF_PLAN},
        single_task=replace(SINGLE_TASK_METHOD, training=single),
    )


def _methods(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Method]:
    """Methods by name, of those that can train the networks of the benchmark."""
    source = SOURCES[options.benchmark]
    every = methods(source.preset)
    lists = {"all": [n for n, m in every.items() if not unsuited(m, source)], "none": []}
    chosen = chosen_methods(options, parser, source.preset, lists)
    for name, method in chosen.items():
        if why := unsuited(method, source):
            parser.error(f"{name} {why}; {options.benchmark} has another: leave the method out")
    if not chosen:
        parser.error("no methods: name some with --methods or --arm")
    return chosen


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

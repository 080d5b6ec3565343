"""Multi-task learning on QM9 in minutes: ``python -m examples.demo``.

Trains single-task models, linear scalarization (LS), scale-invariant scalarization (SI) and
BayesAgg, each BayesAgg also with s = 0, on 11 properties of real molecules; prints and plots how
they compare. The network is an MLP on geometric descriptors, a cheap proxy for the message-passing
network of the paper: its figures are not those of the paper's QM9 benchmark.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import bayesagg
from examples.arguments import Parser, make_folder, whole
from examples.data import DataUnavailableError, MultiTaskData
from examples.data.qm9 import TOTAL_MOLECULES, load_qm9
from examples.jobs import Tick, run_jobs
from examples.methods import METHODS, LinearScalarization
from examples.models import mlp, single_task
from examples.plotting import plot_comparison
from examples.reporting import (
    SINGLE_TASK,
    Row,
    Run,
    spread,
    summarise,
    summary_table,
    task_table,
    write_csv,
    write_json,
)
from examples.training import (
    TrainSettings,
    mean_absolute_errors,
    mean_squared_errors,
    refit_absolute_errors,
    train,
)

MIN_MOLECULES = 100
LABELS = {SINGLE_TASK: "single-task", **{name: method.label for name, method in METHODS.items()}}


@dataclass(frozen=True)
class Job:
    """One training: a method of :data:`METHODS` or the single-task models, with one seed."""

    method: str
    molecules: int
    settings: TrainSettings


_load = lru_cache(maxsize=1)(load_qm9)  # once per process, whatever the number of its jobs


def run_job(job: Job, tick: Tick) -> Run:
    """Train and evaluate at the last epoch; no part but the training part is read before."""
    data = _load(job.molecules)
    build, tasks = partial(mlp, data.train.x.shape[1]), len(data.tasks)
    single = job.method == SINGLE_TASK
    torch.manual_seed(job.settings.seed)
    model = single_task(build, tasks) if single else build(tasks)
    # The sum of losses that share no parameter trains each single-task network on its own loss.
    method = LinearScalarization if single else METHODS[job.method].build
    update = method(model, job.settings, job.settings.steps_per_epoch(data))
    criterion = mean_squared_errors(data.tasks)
    history = train(model, update, data, criterion, job.settings, tick)
    return Run(
        method=job.method,
        seed=job.settings.seed,
        settings={} if single else METHODS[job.method].settings,
        test=mean_absolute_errors(model, data, data.test),
        val=mean_absolute_errors(model, data, data.val),
        refit=refit_absolute_errors(model, data, data.test),
        seconds=history.seconds,
        seconds_per_step=history.seconds_per_step,
        weights=history.weights,
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a bad argument ends the program with one line and status 2."""
    parser = Parser(
        prog="python -m examples.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument, metavar="N")
    add("--seeds", type=whole(1), default=1, help="trainings of each method (default: 1)")
    add("--epochs", type=whole(1), default=30, help="epochs of each training (default: 30)")
    add(
        "--molecules",
        type=whole(MIN_MOLECULES, TOTAL_MOLECULES),
        default=30_000,
        help=f"molecules, chosen at random, {MIN_MOLECULES} to {TOTAL_MOLECULES} (default: 30000)",
    )
    add(
        "--workers",
        type=whole(1),
        default=min(4, os.cpu_count() or 1),
        help="trainings at a time, each in its own process (default: the cores, at most 4)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"methods besides the single-task models, of: {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/demo"),
        metavar="FOLDER",
        help="where figure, CSV and JSON are written (default: output/demo)",
    )
    options = parser.parse_args(arguments)
    make_folder(options.output, parser)
    return options


def _describe(options: argparse.Namespace, settings: TrainSettings) -> dict[str, Any]:
    """Every setting that all runs share, for the record."""
    shared = asdict(settings)
    # The seed is of each run; the others are described in words below.
    for name in ("seed", "schedule", "selection", "patience"):
        del shared[name]
    return {
        "data": "QM9, geometric descriptors",
        "molecules": options.molecules,
        "split": "80/10/10, seed 0",
        "network": "MLP 256-256-64, ELU, one linear head of 11 outputs",
        "optimizer": "Adam",
        "schedule": "cosine to 0",
        "gradient_clipping": "none",
        "evaluated": "last epoch",
        **shared,
        "seeds": options.seeds,
        "workers": options.workers,
        "python": platform.python_version(),
        "bayesagg": bayesagg.__version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "qm9pack")},
    }


def run_all(options: argparse.Namespace, settings: TrainSettings) -> list[Run]:
    """Train every method with every seed, under one progress bar."""
    jobs = [
        Job(method, options.molecules, replace(settings, seed=seed))
        for method in (SINGLE_TASK, *dict.fromkeys(options.methods))
        for seed in range(options.seeds)
    ]
    with tqdm(total=len(jobs) * settings.epochs, desc="training", unit="epoch") as bar:
        return run_jobs(run_job, jobs, workers=min(options.workers, len(jobs)), on_tick=bar.update)


def print_report(rows: Sequence[Row], data: MultiTaskData, settings: TrainSettings) -> None:
    """Print both tables, what s = 0 changes, and how to read them."""
    print(f"\n{task_table(rows, LABELS, data.tasks, data.units)}\n")
    print(f"{summary_table(rows, LABELS)}\n")
    print(
        f"Test part, last epoch for all. Every method starts with {settings.pretrain_epochs} epoch "
        "of LS; clipping: none.\nΔm: mean relative difference to the single-task errors, lower is "
        "better. Refit heads: every\nmethod's heads, and the single-task models', replaced by "
        "least squares on its final features."
    )
    found = {row.method: row for row in rows}
    for row in rows:
        full = METHODS[row.method].ablation_of if row.method in METHODS else None
        if full in found:
            print(
                f"Effect of s = 0 on {LABELS[full]}: Δm {spread(found[full].delta)} % "
                f"-> {spread(row.delta)} % without task weights."
            )
    if settings.epochs <= settings.pretrain_epochs:
        print("Note: with so few epochs no method has left LS; differences mean nothing.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = parse_arguments(arguments)
    settings = TrainSettings(epochs=options.epochs)
    print(f"QM9: {options.molecules} molecules, {options.epochs} epochs, {options.seeds} seed(s)")
    try:
        data = _load(options.molecules)
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    runs = run_all(options, settings)
    seconds = time.perf_counter() - start
    rows = summarise(runs)
    print_report(rows, data, settings)
    print(f"All training together took {seconds:.0f} s with {options.workers} worker(s).")
    described = _describe(options, settings)
    files = [options.output / name for name in ("demo.png", "results.csv", "results.json")]
    title = f"QM9 proxy: {options.molecules:,} molecules, MLP, {options.epochs} epochs"
    # With s = 0 all shares are equal: nothing to see.
    ablations = [name for name, method in METHODS.items() if method.ablation_of]
    plot_comparison(files[0], rows, LABELS, data.tasks, without_panel=ablations, title=title)
    write_csv(files[1], runs, described, data.tasks, data.units)
    write_json(files[2], runs, rows, described, data.tasks, data.units)
    print("Written:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A comparison from search to statistics; every training goes through the store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from examples.comparison.catalogue import SINGLE_TASK, SINGLE_TASK_METHOD, Method
from examples.comparison.runs import (
    Data,
    Job,
    Run,
    Store,
    criteria,
    identity,
    key_of,
    load,
    run_job,
)
from examples.comparison.search import FIRST_SEARCH_SEED, FURTHEST, Trial, choose, trial, widened
from examples.comparison.statistics import Standing, compare, task_means
from examples.jobs import run_jobs
from examples.training import TrainSettings

AGAINST = ("ls", "si")
_SCHEDULES = {
    "constant": "constant",
    "cosine": "cosine to 0",
    "half": "x 0.5 after half of the epochs",
    "steps": "x 0.1 after 60 % and 80 % of the epochs",
    "plateau": "x 0.7 after more than 5 epochs without a lower validation score, down to 1e-5",
}
_EVALUATED = {"last": "last epoch", "best": "epoch with the lowest validation score"}


@dataclass(frozen=True)
class Plan:
    """What to compare."""

    data: Data  # which data
    methods: Mapping[str, Method]  # methods by name; the single-task models come on top
    training: TrainSettings  # default settings of the training
    seeds: int = 5  # trainings of each method with the chosen settings, seeds 0, 1, …
    trials: int = 1  # settings that are tried for each method; 1: the default, without a search
    search_seeds: int = 1  # trainings of each trial
    untuned: tuple[str, ...] = ()  # methods that keep their default settings
    workers: int = 1  # processes
    device: str = "cpu"  # where all is trained
    reference: str = "ls"  # method whose Δm is subtracted from that of the others in the table
    single_task: Method = SINGLE_TASK_METHOD  # the single-task models' method
    part: str = "test"  # that tables are of; with ``val`` no run looks at the test part


@dataclass(frozen=True)
class Chosen:
    """Outcome of the search for a method."""

    trial: Trial  # the settings chosen
    number: int = 0  # their number; 0 is the default
    # Validation Δm of every trial in percent, infinite where training failed; empty without a
    # search
    validation: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Result of a comparison."""

    chosen: dict[str, Chosen]  # by method, the single-task models first, the settings
    runs: dict[str, list[Run]]  # by method its final runs, in the order of the seeds
    # By method its statistics, without methods of which a run failed
    standings: dict[str, Standing]


class ComparisonError(RuntimeError):
    """The comparison cannot be made; the message says why."""


def run_all(jobs: Sequence[Job], store: Store, workers: int, title: str) -> list[Run]:
    """Do the jobs that are not in the store yet, under one progress bar.

    Returns:
        A run per job, in order.
    """
    keys = [key_of(identity(job)) for job in jobs]
    todo = {k: job for k, job in zip(keys, jobs, strict=True) if store.get(k) is None}
    total = sum(job.settings.epochs for job in todo.values())
    if todo:
        skipped = f", {len(jobs) - len(todo)} of {len(jobs)} runs were there"
        with tqdm(total=total, desc=title + skipped, unit="epoch") as bar:
            run_jobs(
                run_job,
                list(todo.values()),
                workers=min(workers, len(todo)),
                on_tick=bar.update,
                on_result=store.add,
            )
    runs = []
    for key, job in zip(keys, jobs, strict=True):
        run = store.get(key)
        if run is None:  # the worker saw other settings, data or code than this process
            raise ComparisonError(
                f"a finished run of {job.method.label} is not found under its key: was the code "
                f"changed while it ran? Start the command again."
            )
        # The same settings may go by two names.
        runs.append(replace(run, method=job.name, label=job.method.label))
    return runs


def execute(plan: Plan, store: Store) -> Outcome:
    """Search, train with the chosen settings, compare.

    Raises:
        ComparisonError: If the single-task models, which all is measured by, failed.
    """
    everything = {SINGLE_TASK: plan.single_task, **plan.methods}
    chosen = search(plan, everything, store)
    final = plan.part == "test"
    jobs = [
        Job(plan.data, name, c.trial.method, replace(c.trial.training, seed=s), final, plan.device)
        for name, c in chosen.items()
        for s in range(plan.seeds)
    ]
    runs: dict[str, list[Run]] = {name: [] for name in everything}
    for run in run_all(jobs, store, plan.workers, "comparison"):
        runs[run.method].append(run)
    return Outcome(chosen, runs, _standings(plan, runs))


def search(plan: Plan, methods: Mapping[str, Method], store: Store) -> dict[str, Chosen]:
    """Choose the settings of each method by the validation part alone.

    A method whose best trial has the lowest or the highest learning rate of its trials has more.
    """
    counts = {name: 1 if name in plan.untuned else plan.trials for name in methods}
    trials = {
        name: [trial(method, plan.training, n) for n in range(counts[name])]
        for name, method in methods.items()
    }
    chosen = {name: Chosen(tried[0]) for name, tried in trials.items()}
    if plan.trials == 1:
        return chosen
    seeds = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + plan.search_seeds)
    todo = {name: list(tried) for name, tried in trials.items() if len(tried) > 1}
    found: dict[str, list[list[Run]]] = {name: [] for name in todo}
    while todo:
        jobs = [
            Job(plan.data, name, t.method, replace(t.training, seed=seed), False, plan.device)
            for name, tried in todo.items()
            for t in tried
            for seed in seeds
        ]
        runs = iter(run_all(jobs, store, plan.workers, "search"))
        for name, tried in todo.items():
            found[name] += [[next(runs) for _ in seeds] for _ in tried]
        choices, todo = _choices(plan, found), {}
        for name, (number, deltas) in choices.items():
            further = widened(trials[name], number) if math.isfinite(deltas[number]) else None
            if further and len(trials[name]) < plan.trials + FURTHEST:
                trials[name].append(further)
                todo[name] = [further]
    return chosen | {name: Chosen(trials[name][c[0]], *c) for name, c in choices.items()}


def _choices(
    plan: Plan, found: Mapping[str, list[list[Run]]]
) -> dict[str, tuple[int, list[float]]]:
    """Number of the chosen trial and validation Δm of every trial, by method.

    The single-task models are chosen by Δm against their own default, the others by Δm against the
    chosen single-task models.
    """
    data = load(plan.data)
    single = found[SINGLE_TASK]
    _require(single[0])
    reference = task_means(criteria(data, single[0], "val"))
    values = {
        name: [[None if run.failure else criteria(data, [run], "val")[0] for run in t] for t in ts]
        for name, ts in found.items()
    }
    number, _ = choose(values[SINGLE_TASK], reference, data.higher_is_better)
    reference = task_means(criteria(data, single[number], "val"))
    return {name: choose(tried, reference, data.higher_is_better) for name, tried in values.items()}


def _standings(plan: Plan, runs: Mapping[str, list[Run]]) -> dict[str, Standing]:
    data = load(plan.data)
    _require(runs[SINGLE_TASK])
    complete = {
        name: criteria(data, group, "shown")
        for name, group in runs.items()
        if not any(run.failure for run in group)
    }
    single = complete.pop(SINGLE_TASK)
    if not complete:
        return {}
    return compare(complete, single, data.higher_is_better, AGAINST)


def _require(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.failure:
            raise ComparisonError(
                f"the single-task models failed with seed {run.seed} ({run.failure}); all methods "
                "are measured by them: choose another learning rate"
            )


def shared_settings(plan: Plan) -> dict[str, Any]:
    """What all methods have in common, for the record."""
    data, training = load(plan.data), plan.training
    return {
        "benchmark": plan.data.benchmark,
        "data": data.version,
        "network": data.network,
        "optimizer": training.optimizer,
        "schedule": _SCHEDULES[training.schedule],
        "evaluated": _EVALUATED[training.selection],
        **({"patience": training.patience} if training.patience else {}),
        **{key: getattr(training, key) for key in ("epochs", "warmup_steps", "batch_size")},
        "default_learning_rate": training.learning_rate,
        "single_task_training": plan.single_task.training,
        "default_weight_decay": training.weight_decay,
        "clip_norm": training.clip_norm,
        **{key: getattr(plan, key) for key in ("seeds", "trials", "search_seeds")},
        "untuned": list(plan.untuned),
        **{key: getattr(plan, key) for key in ("workers", "device")},
    }

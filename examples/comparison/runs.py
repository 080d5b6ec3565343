"""One training of a comparison: what identifies it, running it, and what it leaves, on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bayesagg
from bayesagg.errors import BayesAggError
from examples import methods as updates
from examples import training
from examples.comparison import benchmark as benchmark_module
from examples.comparison import networks, tasks
from examples.comparison.benchmark import Benchmark, changed, predict, validation_scores
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import SINGLE_TASK, Method
from examples.comparison.tasks import measure, primary
from examples.jobs import Tick
from examples.methods import BayesAggregation
from examples.training import TrainSettings, train


@dataclass(frozen=True)
class Data:
    """Which data: a benchmark, its size and the largest number of training data."""

    benchmark: str
    size: int | None
    max_train: int | None
    change: tuple[tuple[str, float], ...] = ()  # to its labels, as of :func:`changed`


@dataclass(frozen=True)
class Job:
    """One training."""

    data: Data  # which data
    name: str  # name of the method
    method: Method  # the method
    settings: TrainSettings  # what all methods share
    final: bool  # whether the test part is evaluated; runs of the search never look at it
    device: str = "cpu"  # where it is trained


@dataclass(frozen=True)
class Run:
    """What a training leaves."""

    key: str  # hash of all that the result depends on
    identity: dict[str, Any]  # what was hashed
    method: str  # name of the method
    label: str  # its name in tables
    # Metrics per task on the validation part; empty if the training failed
    val: list[dict[str, float]]
    test: list[dict[str, float]]  # the same on the test part; empty for runs of the search
    extra: dict[str, float]  # other measures on the test part
    failure: str  # why there is no result; empty if there is
    seconds: float  # wall time of the training
    seconds_per_step: float  # median over epochs of the mean time of a step
    weights: list[float]  # share of each task in the weights of the last epoch

    @property
    def seed(self) -> int:
        """Seed of weights and batches."""
        return int(self.identity["training"]["seed"])

    @property
    def shown(self) -> list[dict[str, float]]:
        """Metrics that tables are of: on the test part, where the run has looked at it."""
        return self.test or self.val


@lru_cache(maxsize=2)  # once per process, whatever the number of its jobs and changes
def load(data: Data) -> Benchmark:
    """Read the data of a benchmark."""
    if data.change:
        return changed(load(replace(data, change=())), dict(data.change))
    return SOURCES[data.benchmark].load(data.size, data.max_train)


def identity(job: Job) -> dict[str, Any]:
    """All that the result of a job depends on, in the types that JSON has."""
    content = {
        "benchmark": job.data.benchmark,
        "data": load(job.data).version,
        "network": load(job.data).network,
        "single_task": job.name == SINGLE_TASK,
        "update": job.method.update.__name__,
        "settings": job.method.described(),
        "training": asdict(job.settings),
        "final": job.final,
        "device": job.device,
        "code": code_version(job),
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(content))


def key_of(content: dict[str, Any]) -> str:
    """Hash of an identity."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def code_version(job: Job) -> str:
    """Hash of the source that the result of a job depends on.

    The files that list methods or benchmarks are no part of it: a new arm leaves results valid.
    """
    shared = (training, updates, tasks, networks, benchmark_module)
    source = SOURCES[job.data.benchmark]
    modules = [*shared, *source.code, inspect.getmodule(getattr(source.load, "func", source.load))]
    modules += [inspect.getmodule(cls) for cls in job.method.code()]
    files = {Path(inspect.getfile(module)) for module in modules if module is not None}
    if issubclass(job.method.update, BayesAggregation):
        files |= set(Path(bayesagg.__file__).parent.rglob("*.py"))
    return _hash_files(tuple(sorted(files)))


@lru_cache
def _hash_files(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def run_job(job: Job, tick: Tick) -> Run:
    """Train and evaluate; the test part only where it is asked for."""
    data, content = load(job.data).to(job.device), identity(job)
    torch.manual_seed(job.settings.seed)
    single = job.name == SINGLE_TASK
    model = data.single_task() if single else job.method.network(data.model)
    model = model.to(job.device)  # made on the CPU: with the same weights on every device
    losses = job.method.criterion(data.criterion)
    result: dict[str, Any] = {"val": [], "test": [], "extra": {}, "failure": ""}
    history = None
    try:
        steps = job.settings.steps_per_epoch(data)
        with torch.device(job.device):
            update = job.method.update(model, job.settings, steps, **job.method.settings)
        scores = partial(validation_scores, model, data)
        history = train(model, update, data, losses, job.settings, tick, scores)
        result |= _evaluate(model, data, job.final)
    except (ArithmeticError, BayesAggError, torch.linalg.LinAlgError) as error:
        result["failure"] = f"{type(error).__name__}: {error}"
    return Run(
        key=key_of(content),
        identity=content,
        method=job.name,
        label=job.method.label,
        seconds=history.seconds if history else 0.0,
        seconds_per_step=history.seconds_per_step if history else 0.0,
        weights=history.weights[-1] if history else [],
        **result,
    )


def _evaluate(model: nn.Module, data: Benchmark, final: bool) -> dict[str, Any]:
    """Metrics on the validation part and, where it is the final run, on the test part.

    Raises:
        DivergedError: If a metric is not finite.
    """
    result: dict[str, Any] = {}
    for name in ("val", "test") if final else ("val",):
        if data.evaluate:
            result[name] = data.evaluate(model, getattr(data, name))
            if not all(map(math.isfinite, (v for task in result[name] for v in task.values()))):
                raise training.DivergedError("a metric is not finite")
            continue
        outputs, y = predict(model, getattr(data, name))
        for head, values in outputs.items():
            if not values.isfinite().all():
                raise training.DivergedError(f"outputs of {head} are not finite")
        result[name] = measure(data.tasks, outputs, y, data.scale)
        if name == "test":
            result["extra"] = {n: measured(outputs, y) for n, measured in data.extra.items()}
    return result


def criteria(data: Benchmark, runs: Sequence[Run], part: str) -> list[list[float]]:
    """The metric of each task that Δm uses, for each run: ``(runs, K)``."""
    return [primary(data.tasks, getattr(run, part)) for run in runs]


class Store:
    """Runs of a file; a run that is there is not computed again.

    A run is found by its key only, so runs of other settings, data or code in the same file are
    never taken for it.

    Args:
        path: File of the runs; made at the first run.

    Raises:
        ValueError: If a line is not a run, or its content does not have its key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, Run] = {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        if lines[-1]:  # a run is written with the end of its line: this one was cut short
            warnings.warn(f"{self._path}: the last line is incomplete and is dropped", stacklevel=2)
            self._path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
        for number, line in enumerate(lines[:-1], 1):
            try:
                run = Run(**json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"{self._path}, line {number}: not a run of a comparison ({error}); "
                    "move the file away or choose another folder"
                ) from error
            if key_of(run.identity) != run.key:
                raise ValueError(f"{self._path}, line {number}: the run was changed by hand")
            self._runs[run.key] = run

    def get(self, key: str) -> Run | None:
        """The run of that key, if it is finished."""
        return self._runs.get(key)

    def add(self, run: Run) -> None:
        """Keep a run and write its line."""
        self._runs[run.key] = run
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")

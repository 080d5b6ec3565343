"""Trials of what breaks methods: ``python -m examples.comparison.stress``.

Small synthetic tasks on one MLP, each trial with something unusual. Prints the test loss of every
method relative to plain linear scalarization with the same seed: the mean over the seeds, and the
largest mean over a task. Regressions are measured against their values without noise, in units of
their variance, classifications by their cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bayesagg.errors import BayesAggError
from examples.arguments import Parser, whole
from examples.comparison.catalogue import methods, more_methods
from examples.comparison.networks import mlp
from examples.comparison.report import markdown
from examples.comparison.tasks import Task, by_task, criterion
from examples.data import Split
from examples.jobs import Tick, run_jobs
from examples.training import TrainSettings, train

INPUTS, WIDTHS, TEST = 20, (64, 64, 32), 2000
_NOISE = (0.1, 0.3, 0.5, 1.0)  # of the regressions, in standard deviations of the signal
_SETTINGS = TrainSettings(epochs=40, batch_size=64, learning_rate=3e-3)


class Rescaled(Split):
    """Labels of the first task a thousand times larger after some batches."""

    def __init__(self, x: Tensor, y: Tensor, after: int) -> None:
        super().__init__(x, y)
        object.__setattr__(self, "_left", [after])

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given rows."""
        x, y = super().batch(rows)
        self._left[0] -= 1
        return x, torch.cat([y[:, :1] * 1000, y[:, 1:]], 1) if self._left[0] < 0 else y


@dataclass(frozen=True)
class Data:
    """Tasks, a training part, and test data with what they are measured by.

    Attributes:
        tasks: All regressions, or a regression and a binary task.
        train: With noise.
        test: Regressions without noise.
        unit: What test errors of regressions are divided by, before they are squared.
    """

    tasks: tuple[Task, ...]
    train: Split
    test: Split
    unit: Tensor


def signals(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random smooth functions of unit variance that share hidden units, ``[N, count]``."""
    hidden = torch.tanh(x @ torch.randn(INPUTS, 32, generator=generator) / INPUTS**0.5 * 1.5)
    y = hidden @ torch.randn(32, count, generator=generator)
    return (y - y.mean(0)) / y.std(0)


def regressions(
    seed: int, count: int = 4, size: int = 1000, noise: Callable[..., Tensor] | None = None
) -> Data:
    """Regressions with noise of its own kind, Gaussian of four sizes by default."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size + TEST, INPUTS, generator=generator)
    clean = signals(x, count, generator)
    spread = torch.tensor([_NOISE[k % len(_NOISE)] for k in range(count)])
    drawn = torch.randn(size, count, generator=generator)
    y = clean[:size] + spread * (drawn if noise is None else noise(drawn, generator))
    tasks = tuple(Task(f"task {k}", "regression", "mae") for k in range(count))
    test = Split(x[size:], clean[size:])
    return Data(tasks, Split(x[:size], y), test, torch.ones(count))


def heavy_tails(seed: int) -> Data:
    """Noise of Student's t with 1.5 degrees of freedom: without a variance."""

    def noise(drawn: Tensor, generator: torch.Generator) -> Tensor:
        chi = torch.randn(*drawn.shape, 3, generator=generator).square().sum(-1) / 3
        return (drawn / chi).clamp(-1000, 1000)

    return regressions(seed, noise=noise)


def pure_noise(seed: int) -> Data:
    """The labels of the last task have nothing to do with its inputs."""
    data = regressions(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    y = data.train.y.clone()
    y[:, -1] = torch.randn(len(y), generator=generator)
    clean = torch.cat([data.test.y[:, :-1], torch.zeros(TEST, 1)], 1)
    return replace(data, train=Split(data.train.x, y), test=Split(data.test.x, clean))


def rescaled(seed: int) -> Data:
    """In mid-training the labels of one task are a thousand times as large from one step on."""
    data = regressions(seed)
    steps = _SETTINGS.steps_per_epoch(data) * _SETTINGS.epochs
    unit = torch.tensor([1000.0, 1, 1, 1])
    train = Rescaled(data.train.x, data.train.y, steps // 2)
    return replace(data, train=train, test=Split(data.test.x, data.test.y * unit), unit=unit)


def rare(seed: int) -> Data:
    """A binary task with a positive in a hundred, beside a regression."""
    data = regressions(seed, count=2, size=4000)
    cut = torch.cat([data.train.y[:, 1], data.test.y[:, 1]]).quantile(0.99)
    train, test = (
        Split(part.x, torch.stack([part.y[:, 0], (part.y[:, 1] > cut).float()], 1))
        for part in (data.train, data.test)
    )
    tasks = (data.tasks[0], Task("rare", "binary", "auroc"))
    return Data(tasks, train, test, data.unit)


TRIALS: dict[str, tuple[Callable[[int], Data], dict[str, object]]] = {
    "nothing unusual": (regressions, {}),
    "heavy tails": (heavy_tails, {}),
    "noise-free": (lambda seed: regressions(seed, noise=lambda drawn, _: 0 * drawn), {}),
    "labels x 1000": (rescaled, {}),
    "pure noise": (pure_noise, {}),
    "50 tasks": (lambda seed: regressions(seed, count=50), {}),
    "Adam, lr 0.03": (regressions, {"learning_rate": 0.03}),
    "SGD, lr 0.1": (regressions, {"learning_rate": 0.1, "optimizer": "sgd"}),
    "rare class": (rare, {"epochs": 10}),
    "100 data": (lambda seed: regressions(seed, size=100), {"epochs": 100}),
}
METHODS = {
    name: method
    for found in (methods("utkface"), more_methods("utkface"))
    for name, method in found.items()
    if not name.startswith("ensemble")
}
_data = lru_cache(maxsize=1)(lambda trial, seed: TRIALS[trial][0](seed))


@dataclass(frozen=True)
class Job:
    """A training of a method in a trial."""

    trial: str
    method: str
    seed: int


def run_job(job: Job, tick: Tick) -> list[float]:
    """Test loss of every task, infinite where training failed."""
    data = _data(job.trial, job.seed)
    if isinstance(data.train, Rescaled):
        data = TRIALS[job.trial][0](job.seed)  # it counts its batches
    settings = replace(_SETTINGS, seed=job.seed, **TRIALS[job.trial][1])
    torch.manual_seed(job.seed)
    model = mlp(INPUTS, WIDTHS, data.tasks)
    method = METHODS[job.method]
    steps = settings.steps_per_epoch(data)
    update = method.update(model, settings, steps, **method.settings)
    try:
        train(model, update, data, criterion(data.tasks), settings)
        found = losses(data, model(data.test.x))
    except (ArithmeticError, BayesAggError, torch.linalg.LinAlgError):
        found = [float("inf")] * len(data.tasks)
    tick()
    return found


@torch.no_grad()
def losses(data: Data, outputs: dict[str, Tensor]) -> list[float]:
    """Test loss of every task."""
    found = []
    for k, (task, z) in enumerate(zip(data.tasks, by_task(data.tasks, outputs), strict=True)):
        y = data.test.y[:, k]
        error = (
            F.mse_loss(z, y) / data.unit[k] ** 2
            if task.kind == "regression"
            else F.binary_cross_entropy_with_logits(z, y)
        )
        found.append(error.item() if error.isfinite() else float("inf"))
    return found


def row(
    trial: str, name: str, ours: Sequence[list[float]], plain: Sequence[list[float]]
) -> list[str]:
    """A line of the table: ratio of the mean loss, mean over seeds, and the worst task's."""
    ratios = [mean(a) / mean(b) for a, b in zip(ours, plain, strict=True)]
    failed = sum(ratio == float("inf") for ratio in ratios)
    if failed:
        return [trial, METHODS[name].label, f"{failed} of {len(ratios)} diverged", "", ""]
    tasks = zip(zip(*ours, strict=True), zip(*plain, strict=True), strict=True)
    worst = max(mean(x / y for x, y in zip(a, b, strict=True)) for a, b in tasks)
    deviation = f" ± {stdev(ratios):.3f}" if len(ratios) > 1 else ""
    best = f"{mean(map(mean, plain)):.4f}"
    return [trial, METHODS[name].label, f"{mean(ratios):.3f}{deviation}", f"{worst:.3f}", best]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; returns the exit status."""
    parser = Parser(
        prog="python -m examples.comparison.stress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trials",
        nargs="+",
        choices=TRIALS,
        default=list(TRIALS),
        metavar="NAME",
        help=f"of: {', '.join(TRIALS)} (default: all)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["bayesagg"],
        metavar="NAME",
        help=f"beside ls, of: {', '.join(METHODS)} (default: bayesagg)",
    )
    parser.add_argument("--seeds", type=whole(1), default=10, metavar="N", help="(default: 10)")
    parser.add_argument(
        "--jobs",
        type=whole(1),
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes (default: cores, at most 4)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/stress.json"),
        metavar="FILE",
        help="losses of all runs (default: output/stress.json)",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = dict.fromkeys(["ls", *options.methods])
    jobs = [
        Job(t, name, seed)
        for t in options.trials
        for seed in range(options.seeds)
        for name in names
    ]
    with tqdm(total=len(jobs), unit="run") as bar:
        found = dict(
            zip(
                jobs, run_jobs(run_job, jobs, workers=options.jobs, on_tick=bar.update), strict=True
            )
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = [[job.trial, job.method, job.seed, losses] for job, losses in found.items()]
    options.output.write_text(json.dumps(content), encoding="utf-8")
    seeds = range(options.seeds)
    rows = [
        row(
            t,
            name,
            [found[Job(t, name, s)] for s in seeds],
            [found[Job(t, "ls", s)] for s in seeds],
        )
        for t in options.trials
        for name in names
        if name != "ls"
    ]
    print(markdown(["trial", "method", "test loss / LS", "worst task", "test loss of LS"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

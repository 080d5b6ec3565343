"""Trials of what breaks methods: ``python -m examples.comparison.stress``.

Small synthetic tasks on one MLP, each trial with something unusual. Prints the test loss of every
method relative to plain linear scalarization with the same seed: the mean over the seeds, and the
largest mean over a task. Regressions are measured against their values without noise, in units of
their variance, classifications by their cross-entropy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bayesagg.errors import BayesAggError
from examples.arguments import Parser, add_jobs, whole
from examples.comparison.catalogue import methods, more_methods
from examples.comparison.networks import TaskNet, dense_layers, mlp
from examples.comparison.report import markdown, spread
from examples.comparison.tasks import Task, criterion
from examples.data import Split
from examples.jobs import Tick, run_jobs
from examples.training import TrainSettings, train

INPUTS, WIDTHS, TEST = 20, (64, 64, 32), 2000
_NOISE = torch.tensor([0.1, 0.3, 0.5, 1.0])  # of the regressions, relative to the signal
_SETTINGS = TrainSettings(epochs=40, batch_size=64, learning_rate=3e-3)
_FACTOR = 1000.0

_KNOWN = methods("utkface") | more_methods("utkface")
METHODS = {name: method for name, method in _KNOWN.items() if not name.startswith("ensemble")}


class Data(NamedTuple):
    """Tasks, a noisy training part, a test part of regressions without noise, and the network."""

    tasks: tuple[Task, ...]
    train: Split
    test: Split
    network: Callable[[int, Sequence[int], Sequence[Task]], TaskNet] = mlp


class Rescaled(Split):
    """Labels of the first task a thousand times larger after some batches."""

    def __init__(self, x: Tensor, y: Tensor, after: int) -> None:
        super().__init__(x, y)
        object.__setattr__(self, "_left", [after])

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the given rows."""
        x, y = super().batch(rows)
        self._left[0] -= 1
        return x, torch.cat([y[:, :1] * _FACTOR, y[:, 1:]], 1) if self._left[0] < 0 else y


def regressions(
    seed: int, count: int = 4, size: int = 1000, noise: Callable[..., Tensor] | None = None
) -> Data:
    """Random smooth functions of unit variance that share hidden units, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size + TEST, INPUTS, generator=generator)
    hidden = torch.tanh(x @ torch.randn(INPUTS, 32, generator=generator) / INPUTS**0.5 * 1.5)
    clean = hidden @ torch.randn(32, count, generator=generator)
    clean = (clean - clean.mean(0)) / clean.std(0)
    drawn = torch.randn(size, count, generator=generator)
    drawn = drawn if noise is None else noise(drawn, generator)
    y = clean[:size] + _NOISE.repeat(-(-count // 4))[:count] * drawn
    tasks = tuple(Task(f"task {k}", "regression", "mae") for k in range(count))
    return Data(tasks, Split(x[:size], y), Split(x[size:], clean[size:]))


def heavy_tails(drawn: Tensor, generator: torch.Generator) -> Tensor:
    """Noise with the tails of Student's t of 1.5 degrees of freedom: without a variance."""
    chi = torch.randn(*drawn.shape, 3, generator=generator).square().sum(-1) / 3
    return (drawn / chi).clamp(-1000, 1000)


def pure_noise(seed: int) -> Data:
    """The labels of the last task have nothing to do with its inputs."""
    data = regressions(seed)
    data.train.y[:, -1] = torch.randn(
        len(data.train), generator=torch.Generator().manual_seed(seed + 1)
    )
    data.test.y[:, -1] = 0
    return data


def rescaled(seed: int) -> Data:
    """In mid-training the labels of one task are a thousand times as large from one step on."""
    data = regressions(seed)
    steps = _SETTINGS.steps_per_epoch(data) * _SETTINGS.epochs
    return data._replace(train=Rescaled(data.train.x, data.train.y, steps // 2))


def rare(seed: int) -> Data:
    """A binary task with a positive in a hundred, beside a regression."""
    data = regressions(seed, count=2, size=4000)
    cut = torch.cat([data.train.y[:, 1], data.test.y[:, 1]]).quantile(0.99)
    for part in (data.train, data.test):
        part.y[:, 1] = (part.y[:, 1] > cut).float()
    return data._replace(tasks=(data.tasks[0], Task("rare", "binary", "auroc")))


def mixture(seed: int) -> Data:
    """Two of the regressions, whether the third is above zero, and the fifth of the last."""
    data = regressions(seed)
    for part in (data.train, data.test):
        edges = part.y[:, 3].quantile(torch.linspace(0.2, 0.8, 4))
        part.y[:, 2] = (part.y[:, 2] > 0).float()
        part.y[:, 3] = torch.bucketize(part.y[:, 3].contiguous(), edges).float()
    kinds = Task("sign", "binary", "auroc"), Task("fifth", "multiclass", "accuracy", classes=5)
    return data._replace(tasks=(*data.tasks[:2], *kinds))


def many_classes(seed: int) -> Data:
    """A class of a hundred, drawn by smooth logits, beside a regression without noise."""
    data = regressions(seed, count=101, size=4000, noise=lambda drawn, _: 0 * drawn)
    generator = torch.Generator().manual_seed(seed + 1)
    parts = []
    for part in (data.train, data.test):
        uniform = torch.rand(len(part), 100, generator=generator)
        label = (4 * part.y[:, 1:] - (-uniform.log()).log()).argmax(1, keepdim=True)
        parts.append(Split(part.x, torch.cat([part.y[:, :1], label.float()], 1)))
    kind = Task("class", "multiclass", "accuracy", classes=100)
    return Data((data.tasks[0], kind), *parts)


class UnitVectors(nn.Module):
    """Features divided by their length."""

    def forward(self, h: Tensor) -> Tensor:
        """``(B, width)``."""
        return F.normalize(h, dim=1)


def embedding(inputs: int, widths: Sequence[int], tasks: Sequence[Task]) -> TaskNet:
    """An MLP whose heads read unit vectors of 512 dimensions."""
    layers = dense_layers(inputs, [*widths[:-1], 512])
    return TaskNet(layers.append(UnitVectors()), 512, tasks)


TRIALS: dict[str, tuple[Callable[[int], Data], dict[str, Any]]] = {
    "plain": (regressions, {}),
    "heavy-tails": (lambda seed: regressions(seed, noise=heavy_tails), {}),
    "noise-free": (lambda seed: regressions(seed, noise=lambda drawn, _: 0 * drawn), {}),
    "rescaled": (rescaled, {}),
    "pure-noise": (pure_noise, {}),
    "sgd-0.1": (regressions, {"learning_rate": 0.1, "optimizer": "sgd"}),
    "rare-class": (rare, {"epochs": 10}),
    "unit-vectors": (lambda seed: mixture(seed)._replace(network=embedding), {}),
    "many-classes": (many_classes, {"epochs": 20}),
    "100-data": (lambda seed: regressions(seed, size=100), {"epochs": 100}),
    "300-data": (lambda seed: regressions(seed, size=300), {"epochs": 60}),
}


def run_job(job: tuple[str, str, int], tick: Tick) -> list[float]:
    """Test loss of every task of a trial, by a method with a seed; infinite where it failed."""
    trial, name, seed = job
    make, own = TRIALS[trial]
    data, method = make(seed), METHODS[name]
    settings, losses = replace(_SETTINGS, seed=seed, **own), criterion(data.tasks)
    torch.manual_seed(seed)
    model = data.network(INPUTS, WIDTHS, data.tasks)
    update = method.update(model, settings, settings.steps_per_epoch(data), **method.settings)
    try:
        train(model, update, data, losses, settings)
        with torch.no_grad():
            outputs = model(data.test.x)
            if isinstance(data.train, Rescaled):
                outputs["regression"][:, 0] /= _FACTOR
            found = [loss.item() for loss in losses(outputs, data.test.y).values()]
    except (ArithmeticError, BayesAggError, torch.linalg.LinAlgError):
        found = [math.inf] * len(data.tasks)
    tick()
    return [loss if math.isfinite(loss) else math.inf for loss in found]


def row(
    trial: str, method: str, ours: Sequence[list[float]], plain: Sequence[list[float]]
) -> list[str]:
    """A line of the table from the losses of every seed; where ``plain`` diverged without it."""
    first, infinite = [trial, METHODS[method].label], float("inf")
    if failed := sum(mean(losses) == infinite for losses in ours):
        return [*first, f"{failed} of {len(ours)} diverged", "", ""]
    pairs = [(a, b) for a, b in zip(ours, plain, strict=True) if mean(b) < infinite]
    if not pairs:
        return [*first, "", "", f"{len(plain)} of {len(plain)} diverged"]
    ratios = [mean(a) / mean(b) for a, b in pairs]
    by_task = torch.tensor([a for a, _ in pairs]).double() / torch.tensor([b for _, b in pairs])
    worst = by_task.mean(0).max().item()
    loss = f"{mean(mean(b) for _, b in pairs):.4f}"
    if failed := len(plain) - len(pairs):
        loss += f", {failed} of {len(plain)} diverged"
    return [*first, spread(ratios, 3), f"{worst:.3f}", loss]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; returns the exit status."""
    parser = Parser("comparison.stress", __doc__)
    for name, known, default in (
        ("--trials", TRIALS, list(TRIALS)),
        ("--methods", METHODS, ["bayesagg"]),
    ):
        own = {"choices": known, "default": default, "help": f"of: {', '.join(known)}"}
        parser.add_argument(name, nargs="+", metavar="NAME", **own)
    parser.add_argument("--seeds", type=whole(1), default=10, metavar="N", help="(default: 10)")
    add_jobs(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = dict.fromkeys(["ls", *options.methods])
    jobs = list(product(options.trials, names, range(options.seeds)))
    with tqdm(total=len(jobs), unit="run") as bar:
        results = run_jobs(run_job, jobs, workers=options.jobs, on_tick=bar.update)
    found: dict[tuple[str, str], list[list[float]]] = {}
    for (trial, name, _), result in zip(jobs, results, strict=True):
        found.setdefault((trial, name), []).append(result)
    rows = [
        row(trial, name, ours, found[trial, "ls"])
        for (trial, name), ours in found.items()
        if name != "ls"
    ]
    print(markdown(["trial", "method", "test loss / LS", "worst task", "test loss of LS"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

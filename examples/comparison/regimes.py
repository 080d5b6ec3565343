"""How methods behave over regimes: ``python -m examples.comparison.regimes``.

A regime is QM9's descriptors with one thing changed, or another benchmark. In each of them every
method has the learning rates 1e-3 to 1e-2 in half-decades, and the next beyond for as long as the
best one, by the validation part of the first seed, is at the edge. Prints tables and draws the
figures. A command that was stopped goes on where it was: finished runs are kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bayesagg.diagnostics import Advice, advise
from examples.arguments import Parser, add_jobs, make_folder, whole
from examples.comparison.benchmark import trained
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import methods, more_methods
from examples.comparison.pipeline import run_all
from examples.comparison.regime_report import REFERENCE, Point, write
from examples.comparison.runs import Data, Job, Run, Store, load
from examples.comparison.search import FURTHEST, beyond
from examples.data import DataUnavailableError
from examples.methods import LinearScalarization
from examples.training import Part, TrainSettings

_KNOWN = methods("qm9") | more_methods("qm9")
METHODS = {name: _KNOWN[name] for name in ("ls", "uw", "si", "si-readout", "bayesagg")}
RATES, _FACTOR = (1e-3, 3.2e-3, 1e-2), math.sqrt(10)  # first, and from the edge to the next beyond
_LINE = (1e-4, 3.2e-4, *RATES)  # of the lines "Adam" and "SGD", on which every seed has every one
_MOLECULES, _TRAIN, _STEPS = 50_000, 2_000, 400
_SETTINGS = TrainSettings(epochs=20, batch_size=100)
_CHANGES = {
    "tasks": (11, (2, 5, 11, 33, 100)),
    "noise": (0.0, (0.0, 0.1, 0.2, 0.4)),
    "scale": (1.0, (1e-3, 1.0, 30.0, 1e3)),
    "missing": (0.0, (0.0, 0.5, 0.9)),
}  # what it is where another thing is changed, and the values
_SIZES = (100, 1_000, 2_000, 10_000, 40_000)
_BENCHMARKS = ("yeast", "nhefs")


@dataclass(frozen=True)
class Place:
    """Data and settings of a regime; regimes of two lines can be one place."""

    data: Data
    training: TrainSettings


Tried = dict[tuple[Place, str], dict[float, Run]]  # first seed, by place, method and learning rate


def qm9(train: int = _TRAIN, optimizer: str = "adam", epochs: int = 0, **change: float) -> Place:
    """QM9 with changes; of as many passes as make 400 steps, where nothing is said."""
    own = {"tasks": 11} | {k: v for k, v in change.items() if v != _CHANGES[k][0]}
    steps = math.ceil(train / _SETTINGS.batch_size)
    settings = replace(_SETTINGS, epochs=epochs or round(_STEPS / steps), optimizer=optimizer)
    return Place(Data("qm9", _MOLECULES, train, tuple(own.items())), settings)


def places() -> dict[tuple[str, float | str], Place]:
    """By line and value."""
    found = {(name, v): qm9(**{name: v}) for name, (_, values) in _CHANGES.items() for v in values}
    found |= {("size", size): qm9(size) for size in _SIZES}
    found["optimizer", "sgd"] = qm9(optimizer="sgd")
    for name in _BENCHMARKS:
        source = SOURCES[name]
        found["benchmark", name] = Place(Data(name, source.size, None), source.settings)
    return found


def score(run: Run, part: str) -> float:
    """Logarithm of the geometric mean over tasks of the error; infinite where training failed.

    The error is the MAE of a regression, and what AUROC (binary) or accuracy lack to one.
    """
    if run.failure:
        return math.inf
    logs = []
    for values in getattr(run, part):
        error = values["mae"] if "mae" in values else 1 - values.get("auroc", values["accuracy"])
        logs.append(math.log(max(error, 1e-9)))
    return sum(logs) / len(logs)


def run_places(
    wanted: Sequence[tuple[Place, str, float, int]], store: Store, workers: int, title: str
) -> list[Run]:
    """Trainings by place, method, learning rate and seed."""
    jobs = [
        Job(p.data, name, METHODS[name], replace(p.training, learning_rate=rate, seed=seed), True)
        for p, name, rate, seed in wanted
    ]
    return run_all(jobs, store, workers, title)


def best(tried: dict[float, Run]) -> float:
    """The learning rate with the lowest score on the validation part."""
    return min(tried, key=lambda rate: score(tried[rate], "val"))


def search(where: Sequence[Place], store: Store, workers: int) -> Tried:
    """Every method at every learning rate with one seed, and beyond where the edge is best."""
    found: Tried = {(place, name): {} for place in where for name in METHODS}
    todo = [(*key, rate, 0) for key in found for rate in RATES]
    while todo:
        for (place, name, rate, _), run in zip(
            todo, run_places(todo, store, workers, "search"), strict=True
        ):
            found[place, name][rate] = run
        further = {
            key: beyond(list(tried), best(tried), _FACTOR)
            for key, tried in found.items()
            if len(tried) < len(RATES) + FURTHEST
        }
        todo = [(*key, rate, 0) for key, rate in further.items() if rate]
    return found


def measure(store: Store, seeds: int, workers: int) -> list[Point]:
    """All regimes; each method at its best learning rate, but at each of them on two lines."""
    named = places()
    tried = search(list(dict.fromkeys(named.values())), store, workers)
    rates = {key: best(runs) for key, runs in tried.items()}
    advised = {place: advice(place) for place in dict.fromkeys(named.values())}
    lines = {"Adam": qm9(), "SGD": qm9(optimizer="sgd")}
    at = [(s, v, p, {n: rates[p, n] for n in METHODS}) for (s, v), p in named.items()]
    at += [(s, v, p, dict.fromkeys(METHODS, v)) for s, p in lines.items() for v in _LINE]
    found: dict[tuple[Place, str, float], list[float]] = {}
    for seed in range(seeds):
        wanted = dict.fromkeys((p, n, rate, seed) for *_, p, own in at for n, rate in own.items())
        runs = run_places(list(wanted), store, workers, f"seed {seed}")
        for (*key, _), run in zip(wanted, runs, strict=True):
            found.setdefault(tuple(key), []).append(score(run, "test"))
    return [
        Point(
            line=line,
            value=value,
            place=repr(place),
            advice=advised[place],
            rates=own,
            scores={name: found[place, name, own[name]] for name in METHODS},
            reference=found[place, REFERENCE, rates[place, REFERENCE]],
        )
        for line, value, place, own in at
    ]


def advice(place: Place) -> Advice:
    """What the library says after 100 steps of linear scalarization, on the validation part."""
    data = load(place.data)
    epochs = max(1, round(100 / place.training.steps_per_epoch(data)))
    short = replace(place.training, epochs=epochs, learning_rate=RATES[2])
    model, _ = trained(data, short, LinearScalarization)

    def look(part: Part) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = part.batch(torch.arange(min(1_000, len(part))))
        h = model.backbone(x)
        return h, data.criterion({group.name: group.module(h) for group in model.groups}, y)

    return advise(*look(data.val))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all regimes; returns the exit status."""
    parser = Parser("comparison.regimes", __doc__)
    parser.add_argument("--seeds", type=whole(2), default=3, metavar="N", help="(default: 3)")
    add_jobs(parser)
    parser.add_argument("--output", type=Path, default=Path("output/regimes"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    make_folder(options.output, parser)
    torch.set_num_threads(1)
    try:
        points = measure(Store(options.output / "runs.jsonl"), options.seeds, options.jobs)
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    labels = {name: method.label for name, method in METHODS.items()}
    print(write(options.output, points, labels))
    return 0


if __name__ == "__main__":
    sys.exit(main())

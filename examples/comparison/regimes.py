"""How methods behave over regimes: ``python -m examples.comparison.regimes``.

A regime is QM9's descriptors with one thing changed, or another benchmark. In each of them every
method has the learning rates 1e-3 to 1e-2 in half-decades, and the next beyond for as long as the
best one, by the validation part of the first seed, is at the edge. Prints tables and draws the
figures. A command that was stopped goes on where it was: finished runs are kept, those of other
lines and methods too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bayesagg.diagnostics import Advice, advise
from examples.arguments import Parser, add_jobs, make_folder, whole
from examples.comparison.arms import add_methods, chosen_methods
from examples.comparison.benchmark import trained
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import Method
from examples.comparison.pipeline import run_all
from examples.comparison.regime_report import LINES, REFERENCE, Point, write
from examples.comparison.runs import Data, Job, Run, Store, load
from examples.comparison.search import FURTHEST, beyond
from examples.comparison.statistics import logarithm
from examples.data import DataUnavailableError
from examples.methods import LinearScalarization
from examples.training import Part, TrainSettings

METHODS = ("ls", "uw", "ntkmtl-sr", "si", "si-readout", "bayesagg")
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


Methods = Mapping[str, Method]
Tried = dict[tuple[Place, str], dict[float, Run]]  # first seed, by place, method and learning rate


def qm9(train: int = _TRAIN, optimizer: str = "adam", epochs: int = 0, **change: float) -> Place:
    """QM9 with changes; of as many passes as make 400 steps, where nothing is said."""
    own = {"tasks": 11} | {k: v for k, v in change.items() if v != _CHANGES[k][0]}
    steps = math.ceil(train / _SETTINGS.batch_size)
    settings = replace(_SETTINGS, epochs=epochs or round(_STEPS / steps), optimizer=optimizer)
    return Place(Data("qm9", _MOLECULES, train, tuple(own.items())), settings)


def places(**also: float) -> dict[tuple[str, float | str], Place]:
    """By line and value; ``also``: changes of all those of QM9."""
    found = {
        (name, v): qm9(**(also | {name: v}))
        for name, (_, values) in _CHANGES.items()
        for v in values
    }
    found |= {("size", size): qm9(size, **also) for size in _SIZES}
    found["optimizer", "sgd"] = qm9(optimizer="sgd", **also)
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
        logs.append(logarithm(error))
    return sum(logs) / len(logs)


def run_places(
    wanted: Sequence[tuple[Place, str, float, int]],
    methods: Methods,
    store: Store,
    workers: int,
    title: str,
) -> list[Run]:
    """Trainings by place, method, learning rate and seed."""
    jobs = [
        Job(p.data, name, methods[name], replace(p.training, learning_rate=rate, seed=seed), True)
        for p, name, rate, seed in wanted
    ]
    return run_all(jobs, store, workers, title)


def best(tried: dict[float, Run]) -> float:
    """The learning rate with the lowest score on the validation part."""
    return min(tried, key=lambda rate: score(tried[rate], "val"))


def search(where: Sequence[Place], methods: Methods, store: Store, workers: int) -> Tried:
    """Every method at every learning rate with one seed, and beyond where the edge is best."""
    found: Tried = {(place, name): {} for place in where for name in methods}
    todo = [(*key, rate, 0) for key in found for rate in RATES]
    while todo:
        for (place, name, rate, _), run in zip(
            todo, run_places(todo, methods, store, workers, "search"), strict=True
        ):
            found[place, name][rate] = run
        further = {
            key: beyond(list(tried), best(tried), _FACTOR)
            for key, tried in found.items()
            if len(tried) < len(RATES) + FURTHEST
        }
        todo = [(*key, rate, 0) for key, rate in further.items() if rate]
    return found


def measure(
    lines: Collection[str],
    methods: Methods,
    store: Store,
    seeds: int,
    workers: int,
    **also: float,
) -> list[Point]:
    """Regimes of some lines; each method at its best learning rate, but at each of them on two.

    ``also``: as of :func:`places`.
    """
    named = {key: place for key, place in places(**also).items() if key[0] in lines}
    at_rates = {
        name: qm9(optimizer=name.lower(), **also) for name in ("Adam", "SGD") if name in lines
    }
    where = dict.fromkeys([*named.values(), *at_rates.values()])
    tried = search(list(where), methods, store, workers)
    rates = {key: best(runs) for key, runs in tried.items()}
    advised = {place: advice(place) for place in where}
    at = [(s, v, p, {n: rates[p, n] for n in methods}) for (s, v), p in named.items()]
    at += [(s, v, p, dict.fromkeys(methods, v)) for s, p in at_rates.items() for v in _LINE]
    best_of_all = dict.fromkeys((p, REFERENCE, rates[p, REFERENCE]) for p in where)
    pairs = best_of_all | dict.fromkeys(
        (p, n, rate) for *_, p, own in at for n, rate in own.items()
    )
    found: dict[tuple[Place, str, float], list[float]] = {}
    for seed in range(seeds):
        wanted = [(*pair, seed) for pair in pairs]
        runs = run_places(wanted, methods, store, workers, f"seed {seed}")
        for pair, run in zip(pairs, runs, strict=True):
            found.setdefault(pair, []).append(score(run, "test"))
    return [
        Point(
            line=line,
            value=value,
            place=repr(place),
            advice=advised[place],
            rates=own,
            scores={name: found[place, name, own[name]] for name in methods},
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
    text = f"of: {', '.join(LINES)} (default: all)"
    own = {"choices": LINES, "metavar": "LINE", "help": text}
    parser.add_argument("--lines", nargs="+", default=[*LINES], **own)
    text = f"as of examples.compare; {REFERENCE} always (default: {' '.join(METHODS)})"
    add_methods(parser, METHODS, text)
    parser.add_argument("--seeds", type=whole(2), default=3, metavar="N", help="(default: 3)")
    text = "percent of the labels that are taken away in all regimes of QM9 (default: 0)"
    parser.add_argument("--missing", type=whole(0, 99), default=0, metavar="N", help=text)
    add_jobs(parser)
    parser.add_argument("--output", type=Path, default=Path("output/regimes"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.methods = [REFERENCE, *options.methods]
    chosen = chosen_methods(options, parser, "qm9", {})
    make_folder(options.output, parser)
    torch.set_num_threads(1)
    store = Store(options.output / "runs.jsonl")
    try:
        also = {"missing": options.missing / 100}
        points = measure(options.lines, chosen, store, options.seeds, options.jobs, **also)
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(write(options.output, points, {name: method.label for name, method in chosen.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How sure predictions are, against other methods: ``python -m examples.uncertainty``.

On real data: QM9's molecules (descriptors, 11 regressions), NHEFS (a regression, two binary tasks,
five classes), Yeast (14 binary tasks), MNIST (each digit against the rest) with 300 and 3,000
images. All networks are trained alike, each way of training at the learning rate at which its first
network, scaled, is best on the validation part; whatever is calibrated is calibrated there, and the
test part is looked at once. `nhefs-splits` draws the parts of NHEFS's people anew for every seed: a
share of 325 people has a standard error of up to 3 points. Prints negative log-likelihood in nats,
mean over tasks, ECE (15 bins) and Brier score, mean and standard deviation over seeds, and of
regressions the coverage. The networks of all seeds under linear scalarization (LS) are the
ensemble.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.arguments import Parser
from examples.comparison.benchmark import Benchmark, trained
from examples.comparison.benchmarks import SOURCES, tables
from examples.comparison.report import markdown, spread
from examples.methods import BayesAggregation, LinearScalarization
from examples.training import TrainSettings
from examples.uncertainty import arms
from examples.uncertainty.scores import LEVELS, Beliefs, coverage, mixture, scores

SETS: dict[str, tuple[str, int | None, int | None]] = {
    "qm9": ("qm9", 100_000, 8_000),
    "nhefs": ("nhefs", None, None),
    "nhefs-splits": ("nhefs", None, None),
    "yeast": ("yeast", None, None),
    "mnist-300": ("mnist", None, 300),
    "mnist-3000": ("mnist", None, None),
}
FAMILIES = ("plain", "ours", "laplace", "vbll")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
Believed = Callable[[str], Beliefs]


def alone(data: Benchmark, settings: TrainSettings, family: str) -> Believed:
    """What a network of a family believes, before any posterior is put on it."""
    if family == "vbll":
        return arms.vbll(data, settings)
    update = BayesAggregation if family == "ours" else LinearScalarization
    return arms.plain(data, trained(data, settings, update)[0])


def best_rate(data: Benchmark, settings: TrainSettings, family: str) -> float:
    """Of :data:`RATES`, by the likelihood of validation labels under the scaled network."""
    y = data.val.y.double()

    def loss(rate: float) -> float:
        found = alone(data, replace(settings, learning_rate=rate), family)("val")
        scaled = [b.calibrated(b, y[:, k]) for k, b in enumerate(found)]
        return scores(data.tasks, scaled, y)["nll"]

    return min(RATES, key=loss)


def arms_of(data: Benchmark, settings: TrainSettings, family: str) -> dict[str, Believed]:
    """What the methods of a family believe, on networks of one seed."""
    if family == "ours":
        return arms.ours(data, *trained(data, settings, BayesAggregation))
    if family == "vbll":
        return {"VBLL": alone(data, settings, family)}
    network, _ = trained(data, settings, LinearScalarization)
    if family == "laplace":
        return {"LS, laplace-torch": arms.laplace(data, network)}
    return {"LS": arms.plain(data, network), **arms.on_plain(data, network)}


def results(
    data: Benchmark, name: str, beliefs: dict[str, Beliefs], truth: dict[str, Tensor]
) -> dict[str, Any]:
    """Scores and coverage on the test part; of peers also with a scale or temperature."""
    rows = {name: beliefs["test"]}
    if not any(mark in name for mark in ("Predictor", "evidence", "exact")):
        rows[f"{name}, scaled"] = [
            b.calibrated(own, truth["val"][:, k])
            for k, (b, own) in enumerate(zip(beliefs["test"], beliefs["val"], strict=True))
        ]
    return {
        label: {
            **scores(data.tasks, found, truth["test"]),
            "coverage": coverage(found, truth["test"]),
        }
        for label, found in rows.items()
    }


def evaluate(
    parts: Sequence[Benchmark], settings: TrainSettings, families: Sequence[str]
) -> list[dict[str, Any]]:
    """Results by arm of every seed, which has its own ``parts``.

    If the parts are one, the networks of all seeds are an ensemble, which the first seed reports.
    """
    runs: list[dict[str, Any]] = [{} for _ in parts]
    members = []
    rates = {family: best_rate(parts[0], settings, family) for family in families}
    print(f"learning rates: {rates}")
    for seed, (run, data) in enumerate(zip(runs, parts, strict=True)):
        truth = {"val": data.val.y.double(), "test": data.test.y.double()}
        for family, rate in rates.items():
            now = replace(settings, seed=seed, learning_rate=rate)
            for name, believed in arms_of(data, now, family).items():
                beliefs = {part: believed(part) for part in truth}
                run |= results(data, name, beliefs, truth)
                members += [beliefs] if name == "LS" else []
    if members and parts[0] is parts[-1]:
        mixed = {part: mixture([one[part] for one in members]) for part in truth}
        runs[0] |= results(data, f"ensemble of {len(members)} LS", mixed, truth)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, by arm."""
    rows = []
    for name in runs[0]:
        found = [run[name] for run in runs if name in run]
        keys = [key for key in ("nll", "ece", "brier") if key in found[0]]
        rows.append([name, *(spread([one[key] for one in found], 4) for key in keys)])
    return markdown(["", "NLL", "ECE", "Brier"][: len(rows[0])], rows)


def coverage_table(runs: list[dict[str, Any]]) -> str:
    """Coverage in percent, mean over regressions and seeds; and the largest error of a task."""
    rows = []
    for name in runs[0]:
        found = torch.tensor([run[name]["coverage"] for run in runs if name in run])
        by_task = found.mean(0)  # of seeds, tasks, levels
        worst = (by_task - torch.tensor(LEVELS)).abs().max().item()
        shares = [f"{100 * share:.1f}" for share in by_task.mean(0).tolist()]
        rows.append([name, *shares, f"{100 * worst:.1f} points"])
    titles = [f"{100 * level:.0f} %" for level in LEVELS]
    return markdown(["coverage", *titles, "largest error of a task, mean over seeds"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and save."""
    parser = Parser("uncertainty", __doc__)
    parser.add_argument("sets", nargs="*", default=list(SETS), help="of " + ", ".join(SETS))
    parser.option("seeds", 5, "trainings of every method")
    parser.add_argument("--epochs", type=int, help="default: those of the comparisons")
    parser.add_argument("--only", nargs="*", default=FAMILIES, help="of " + ", ".join(FAMILIES))
    parser.option("out", Path("output/uncertainty.json"), "where results are kept")
    args = parser.parse_args(argv)
    for name in args.sets:
        benchmark, size, most = SETS[name]
        data, settings = SOURCES[benchmark].load(size, most), SOURCES[benchmark].settings
        settings = replace(settings, epochs=args.epochs or settings.epochs)
        start, all_parts = time.perf_counter(), [data] * args.seeds
        if name == "nhefs-splits":
            all_parts = [tables.load_nhefs(split_seed=seed) for seed in range(args.seeds)]
        new = evaluate(all_parts, settings, args.only)
        saved = json.loads(args.out.read_text()) if args.out.exists() else {}
        old = saved.get(name, [{} for _ in new])
        saved[name] = runs = [{**one, **two} for one, two in zip(old, new, strict=True)]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(saved))
        parts = f"{len(data.train)}/{len(data.val)}/{len(data.test)} data"
        print(f"\n{name}: {parts}, {len(data.tasks)} tasks, {args.seeds} seeds, ", end="")
        print(f"{settings.epochs} epochs, {time.perf_counter() - start:.0f} s\n{table(runs)}")
        if data.tasks[0].kind == "regression":
            print(f"\n{coverage_table(runs)}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

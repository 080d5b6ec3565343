"""Which images to label next: ``python -m examples.active_learning``.

MNIST, every digit against the rest: 10 binary tasks on one network that starts with a few labels.
In every round it is trained anew by BayesAgg, and more images of the pool get a label: a batch
whose labels together say most of the heads' weights (``bayesagg.acquisition.select``), those that
the network itself is least sure of, or random ones. Prints the area under the curve of Δm,
the mean relative loss of accuracy against a network trained on the whole pool, in percent, and how
far it is below that of random choice over the same seeds, with a 95 % interval and a paired t-test.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bayesagg import acquisition
from bayesagg.metrics import delta_m
from examples.arguments import Parser
from examples.comparison.benchmark import Benchmark, predict, trained
from examples.comparison.benchmarks import SOURCES
from examples.comparison.report import markdown, spread
from examples.comparison.statistics import paired_interval, paired_p_value
from examples.comparison.tasks import measure, primary
from examples.data import Split
from examples.methods import BayesAggregation
from examples.training import TrainSettings

STYLES = {"random": "C7:o", "entropy of the network": "C1--s", "joint information": "C0-D"}


def accuracies(data: Benchmark, model: Any) -> list[float]:
    """Of every task on the test part."""
    return primary(data.tasks, measure(data.tasks, *predict(model, data.test), data.scale))


def choice(name: str, model: Any, method: Any, pool: Tensor, count: int) -> Tensor:
    """Places in the pool of the images to label next."""
    if name == "random":
        return torch.randperm(len(pool))[:count]
    if name == "joint information":
        return acquisition.select(method.optimizer.predictor(model)(pool)["binary"], count)
    with torch.no_grad():
        p = model(pool)["binary"].double().sigmoid()
    return (torch.special.entr(p) + torch.special.entr(1 - p)).sum(1).topk(count).indices


def run(
    name: str, data: Benchmark, settings: TrainSettings, args: argparse.Namespace
) -> list[list[float]]:
    """Accuracies of all tasks after every round."""
    torch.manual_seed(settings.seed)
    order = torch.randperm(len(data.train))
    known, pool = order[: args.start], order[args.start :]
    found = []
    for _ in range(args.rounds):
        labelled = Split(data.train.x[known], data.train.y[known])
        # Few data are seen more often: as many steps in every round.
        epochs = max(1, round(args.steps * settings.batch_size / len(known)))
        now = replace(data, train=labelled)
        model, method = trained(now, replace(settings, epochs=epochs), BayesAggregation)
        found.append(accuracies(data, model))
        best = choice(name, model, method, data.train.x[pool], args.add)
        keep = torch.ones(len(pool), dtype=torch.bool)
        keep[best] = False
        known, pool = torch.cat([known, pool[best]]), pool[keep]
    return found


def draw(path: Path, labels: list[int], curves: dict[str, list[list[float]]]) -> None:
    """Δm against the number of labels, a line a method and a band over seeds."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.subplots()
    for name, runs in curves.items():
        values = torch.tensor(runs)
        middle, spread = values.mean(0), values.std(0, correction=0)
        ax.plot(labels, middle, STYLES[name], label=name, lw=2)
        ax.fill_between(labels, middle - spread, middle + spread, color=STYLES[name][:2], alpha=0.2)
    ax.set_xlabel("labelled images")
    ax.set_ylabel("Δm against all labels [%], lower is better")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all, print and draw."""
    parser = Parser("active_learning", __doc__)
    parser.option("seeds", 5, "runs of every method")
    parser.option("start", 50, "labels at first")
    parser.option("add", 50, "labels a round")
    parser.option("rounds", 8, "trainings")
    parser.option("steps", 300, "optimizer steps of a training, about")
    parser.option("out", Path("output/active-learning.png"), "the figure")
    args = parser.parse_args(argv)
    data, settings = SOURCES["mnist"].load(None, None), SOURCES["mnist"].settings
    settings = replace(settings, batch_size=50, learning_rate=2e-3)
    epochs = round(args.steps * 4 * settings.batch_size / len(data.train))
    best, _ = trained(data, replace(settings, epochs=epochs), BayesAggregation)
    reference = accuracies(data, best)
    labels = [args.start + args.add * i for i in range(args.rounds)]
    curves: dict[str, list[list[float]]] = {name: [] for name in STYLES}
    for seed in range(args.seeds):
        for name, curve in curves.items():
            found = run(name, data, replace(settings, seed=seed), args)
            curve.append([delta_m(one, reference, True) for one in found])
    areas = {name: [mean(one) for one in curve] for name, curve in curves.items()}
    rows = []
    for name, curve in curves.items():
        means = [f"{value:.2f}" for value in torch.tensor(curve).mean(0).tolist()]
        gain = ["", ""]
        if name != "random":
            pair = areas["random"], areas[name]
            gain = ["{:.2f} ± {:.2f}".format(*paired_interval(*pair))]
            gain.append(f"{paired_p_value(*pair):.3f}")
        rows.append([f"Δm, {name}", *means, spread(areas[name]), *gain])
    print(markdown(["labels", *map(str, labels), "area", "below random", "p"], rows))
    draw(args.out, labels, curves)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()

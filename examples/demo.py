"""Eleven properties of a molecule by one network: ``python -m examples.demo``.

Trains side by side on real molecules of QM9: a network per task, linear scalarization (LS),
scale-invariant scalarization (SI), SI with heads that are set as BayesAgg sets them, and BayesAgg.
The figure is drawn while they train. The networks are MLPs on geometric descriptors, a cheap proxy
for the graph network of the paper: these are not the figures of its benchmark.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from bayesagg.metrics import delta_m
from examples.arguments import Parser
from examples.comparison.ablations import Readout
from examples.comparison.benchmarks.tables import load_qm9
from examples.comparison.networks import mlp, single_task
from examples.comparison.tasks import Task, criterion
from examples.data import DataUnavailableError
from examples.data.qm9 import TARGETS
from examples.methods import BayesAggregation, LinearScalarization, ScaleInvariant
from examples.training import TrainSettings

BATCH = 120
STYLES = {"LS": "C7:", "SI": "C1--", "SI, same heads": "C2-.", "BayesAgg": "C0-"}
METHODS = {
    "SI": ScaleInvariant,
    "SI, same heads": partial(Readout, base=ScaleInvariant),
    "BayesAgg": BayesAggregation,
}


class Arm:
    """A network and how a method trains it; all start with the same steps of LS."""

    def __init__(self, name: str, shape: tuple[int, int], args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.name, self.seconds, self.curve = name, 0.0, []
        tasks = [Task(str(k), "regression", "mae") for k in range(shape[1])]
        self.net = (mlp if name in STYLES else single_task)(shape[0], (256, 256, 64), tasks)
        self.losses = criterion(tasks)
        steps = math.ceil(0.8 * args.molecules / BATCH)
        method = METHODS.get(name, LinearScalarization)
        self.update = method(self.net, TrainSettings(learning_rate=args.lr), steps)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.update.optimizer, args.epochs * steps
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        """A step on a batch."""
        start = time.perf_counter()
        self.update.step(self.losses(self.net(x), y))
        self.schedule.step()
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean absolute error of every task, in standard deviations."""
        return (self.net(x)["regression"] - y).abs().mean(0)


def draw(path: Path, arms: list[Arm], errors: dict[str, Tensor]) -> None:
    """Δm on the validation part by epoch, and every task, against a network per task."""
    with matplotlib.rc_context({"font.size": 12}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.3, 1])
        for arm in arms[1:]:
            epochs, style = range(1, len(arm.curve) + 1), STYLES[arm.name]
            left.plot(epochs, arm.curve, style, marker=".", lw=2, label=arm.name)
            ratio = 100 * (errors[arm.name] / errors[arms[0].name] - 1)
            right.plot(ratio, [target.name for target in TARGETS], style[:2] + "o")
        left.set(title="Δm by epoch", xlabel="epoch", ylabel="error against a network per task [%]")
        right.set(title="every property", xlabel="error against a network per task [%]")
        left.set_yscale("symlog", linthresh=10)
        right.set_xscale("symlog", linthresh=10)
        left.yaxis.set_major_formatter("{x:g}")
        right.xaxis.set_major_formatter("{x:g}")
        left.axhline(0, color="black", lw=1)
        right.axvline(0, color="black", lw=1)
        right.invert_yaxis()
        left.legend(frameon=False)
        figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Train, draw and print."""
    parser = Parser("demo", __doc__)
    sizes = {"molecules": 10_000, "epochs": 20, "lr": 4e-3, "seed": 0}
    for name, default in {**sizes, "output": Path("output/demo")}.items():
        parser.option(name, default)
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        data = load_qm9(args.molecules)
    except (DataUnavailableError, ValueError) as error:
        sys.exit(f"error: {error}")
    train, val, test = data.train, data.val, data.test
    shape = (train.x.shape[1], len(data.tasks))
    arms = [Arm(name, shape, args) for name in ("single-task", *STYLES)]
    batches = torch.Generator().manual_seed(args.seed)
    figure, drawn = args.output / "demo.png", 0.0
    with tqdm(total=args.epochs * math.ceil(len(train) / BATCH), unit="step") as bar:
        for epoch in range(args.epochs):
            for rows in torch.randperm(len(train), generator=batches).split(BATCH):
                for arm in arms:
                    arm.step(*train.batch(rows))
                bar.update()
            errors = {arm.name: arm.errors(val.x, val.y) for arm in arms}
            for arm in arms[1:]:
                arm.curve.append(delta_m(errors[arm.name], errors["single-task"]))
            bar.set_postfix({arm.name: f"{arm.curve[-1]:.1f}" for arm in arms[1:]})
            if time.perf_counter() - drawn > 5 or epoch + 1 == args.epochs:
                draw(figure, arms, errors)
                drawn = time.perf_counter()
    errors = {arm.name: arm.errors(test.x, test.y) * data.scale for arm in arms}
    rows = [("test error", [arm.name for arm in arms])]
    for k, target in enumerate(TARGETS):
        values = [f"{errors[arm.name][k]:.4g}" for arm in arms]
        rows.append((f"{target.name} [{target.unit}]", values))
    deltas = [delta_m(errors[arm.name], errors["single-task"]) for arm in arms]
    rows.append(("Δm [%]", [f"{delta:.1f}" for delta in deltas]))
    rows.append(("ms per step", [f"{1e3 * arm.seconds / bar.total:.1f}" for arm in arms]))
    for name, cells in rows:
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"Δm: mean relative difference to the single-task errors, lower is better: {figure}")


if __name__ == "__main__":
    main()

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
from collections import OrderedDict
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from bayesagg import BayesAggWrapper, LikelihoodRule, RegressionHead
from bayesagg.metrics import delta_m
from examples.data import DataUnavailableError, split_indices
from examples.data.qm9 import TARGETS, load_arrays
from examples.readout import ReadoutRule

BATCH = 120
STYLES = {"LS": "C7:", "SI": "C1--", "SI, same heads": "C2-.", "BayesAgg": "C0-"}


def make_net(inputs: int, tasks: int) -> nn.Sequential:
    """An MLP, ``backbone``, with one linear ``head`` for all tasks."""
    layers: list[nn.Module] = []
    for width in (256, 256, 64):
        layers += [nn.Linear(inputs, width), nn.ELU()]
        inputs = width
    parts = {"backbone": nn.Sequential(*layers), "head": nn.Linear(inputs, tasks)}
    return nn.Sequential(OrderedDict(parts))


class SeparateNets(nn.Module):
    """A network per task; the sum of their losses trains each on its own."""

    def __init__(self, inputs: int, tasks: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(make_net(inputs, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([network(x) for network in self.networks], 1)


class Arm:
    """A network and how a method trains it; all start with the same steps of LS."""

    def __init__(self, name: str, shape: tuple[int, int], args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.name, self.seconds, self.curve = name, 0.0, []
        self.net = (make_net if name in STYLES else SeparateNets)(*shape)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=args.lr, fused=True)
        if name in ("SI, same heads", "BayesAgg"):
            own = {"rule": ReadoutRule(weights=lambda: {"tasks": 1 / self.losses.detach()})}
            self.optimizer = BayesAggWrapper(
                self.optimizer,
                shared_rep_hook=self.net.backbone,
                heads={"tasks": RegressionHead(self.net.head)},
                **({} if name == "BayesAgg" else own),
            )
        steps = args.epochs * math.ceil(0.8 * args.molecules / BATCH)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, x: Tensor, y: Tensor) -> None:
        """A step on a batch."""
        start = time.perf_counter()
        self.losses = (self.net(x) - y).square().mean(0)
        self.optimizer.zero_grad()
        if isinstance(self.optimizer, BayesAggWrapper):
            self.optimizer.step({"tasks": self.losses.sum()})
        else:
            logs = self.name == "SI" and self.schedule.last_epoch >= LikelihoodRule.warmup
            (self.losses.log() if logs else self.losses).sum().backward()
            self.optimizer.step()
        self.schedule.step()
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean absolute error of every task, in standard deviations."""
        return (self.net(x) - y).abs().mean(0)


def read(molecules: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Standardised inputs and targets of the three parts, and the units of the targets."""
    x, y = (torch.from_numpy(array).double() for array in load_arrays(molecules))
    parts = split_indices(molecules, val_fraction=0.1, test_fraction=0.1, seed=0)
    spread, unit = x[parts[0]].std(0), y[parts[0]].std(0)
    x = ((x - x[parts[0]].mean(0)) / torch.where(spread > 0, spread, 1.0)).clamp(-6, 6).float()
    y = ((y - y[parts[0]].mean(0)) / unit).float()
    return [(x[rows], y[rows]) for rows in parts], unit


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
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    for name, kind, default in (
        ("molecules", int, 10_000),
        ("epochs", int, 20),
        ("lr", float, 4e-3),
        ("seed", int, 0),
        ("output", Path, Path("output/demo")),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"({default})")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        (train, val, test), unit = read(args.molecules)
    except (DataUnavailableError, ValueError) as error:
        sys.exit(f"error: {error}")
    shape = (train[0].shape[1], len(unit))
    arms = [Arm(name, shape, args) for name in ("single-task", *STYLES)]
    batches = torch.Generator().manual_seed(args.seed)
    figure, drawn = args.output / "demo.png", 0.0
    with tqdm(total=args.epochs * math.ceil(len(train[0]) / BATCH), unit="step") as bar:
        for epoch in range(args.epochs):
            for rows in torch.randperm(len(train[0]), generator=batches).split(BATCH):
                for arm in arms:
                    arm.step(train[0][rows], train[1][rows])
                bar.update()
            errors = {arm.name: arm.errors(*val) for arm in arms}
            for arm in arms[1:]:
                arm.curve.append(delta_m(errors[arm.name], errors["single-task"]))
            bar.set_postfix({arm.name: f"{arm.curve[-1]:.1f}" for arm in arms[1:]})
            if time.perf_counter() - drawn > 5 or epoch + 1 == args.epochs:
                draw(figure, arms, errors)
                drawn = time.perf_counter()
    errors = {arm.name: arm.errors(*test) * unit for arm in arms}
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

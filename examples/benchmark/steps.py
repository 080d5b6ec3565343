"""Whole training steps of one network: BayesAgg's against plain linear scalarization."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bayesagg import BayesAggWrapper, LikelihoodRule, PaperRule
from examples.benchmark.cases import Case
from examples.benchmark.networks import Workload, make_workload
from examples.methods import HEADS

# Past linear scalarization at once, which is over after 50 steps out of the box.
RULES = {"likelihood": LikelihoodRule(warmup=2), "paper": PaperRule(pretrain_epochs=0)}


@dataclass(frozen=True)
class Arm:
    """A way to take a step: plain, or a rule, with or without ``targets=``."""

    rule: str | None = None
    targets: bool = False

    @property
    def name(self) -> str:
        """As it is printed."""
        return "plain" if self.rule is None else self.rule + " + targets" * self.targets


def arms(case: Case) -> list[Arm]:
    """Plain, and every rule; labels are passed too where steps are quick."""
    passed = (False, True) if case.small else (False,)
    return [Arm(), *(Arm(rule, targets) for rule in case.rules for targets in passed)]


@dataclass(frozen=True)
class Step:
    """A network, its optimizer and the training step that is measured."""

    workload: Workload
    optimizer: torch.optim.Optimizer
    run: Callable[[], None]


def make_step(case: Case, arm: Arm) -> Step:
    """A step in steady state: past linear scalarization, with all buffers made."""
    workload = make_workload(case)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(workload.model.parameters(), lr=1e-3)
    if arm.rule is not None:
        modules = workload.model.heads
        heads = {task.name: HEADS[task.kind](modules[task.name]) for task in case.tasks}
        backbone, rule = workload.model.backbone, RULES[arm.rule]
        optimizer = BayesAggWrapper(optimizer, backbone, heads, rule=rule)
    batches = itertools.cycle(workload.batches)

    def run() -> None:
        batch = next(batches)
        losses = workload.losses(batch)
        optimizer.zero_grad()
        if isinstance(optimizer, BayesAggWrapper):
            optimizer.step(losses, targets=batch[1] if arm.targets else None)
        else:
            sum(losses.values()).backward()
            optimizer.step()

    for _ in range(25 if case.small else 4):
        run()
    return Step(workload, optimizer, run)

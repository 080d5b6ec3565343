"""Whole training steps: BayesAgg's against plain linear scalarization on the same network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.likelihoods import Rule
from examples.benchmark.models import Workload, make_workload
from examples.benchmark.shapes import Shape, Task
from examples.benchmark.timing import Clock, interleave

AnyHead = RegressionHead | BinaryHead | MulticlassHead
_HEADS: dict[str, type[AnyHead]] = {
    "regression": RegressionHead,
    "binary": BinaryHead,
    "multiclass": MulticlassHead,
}
PRETRAIN_STEPS = 3


@dataclass(frozen=True)
class Step:
    """One arm: a network, its optimizer and the training step that is timed."""

    workload: Workload
    optimizer: torch.optim.Optimizer
    run: Callable[[], None]


def plain_step(shape: Shape) -> Step:
    """Linear scalarization in plain PyTorch: ``sum(losses).backward(); optimizer.step()``."""
    workload = make_workload(shape)
    optimizer = torch.optim.Adam(workload.model.parameters(), lr=1e-3)

    def run() -> None:
        losses = workload.losses()
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()

    return Step(workload, optimizer, run)


def bayesagg_step(shape: Shape, rule: Rule = "likelihood") -> Step:
    """The same network under ``BayesAggWrapper``: ``optimizer.step(losses)``.

    Args:
        shape: What to train.
        rule: ``"likelihood"`` with the library's defaults, or ``"paper"`` with its settings.
    """
    workload = make_workload(shape)
    optimizer = wrap(workload, shape, rule)

    def run() -> None:
        losses = workload.losses()
        optimizer.zero_grad()
        optimizer.step(losses)

    return Step(workload, optimizer, run)


def wrap(workload: Workload, shape: Shape, rule: Rule) -> BayesAggWrapper:
    """The wrapper with the settings of a rule; epochs end when they are told to."""
    modules = workload.model.heads
    heads = {
        task.name: make_head(task, modules[task.name])
        if rule == "paper"
        else _HEADS[task.kind](modules[task.name])
        for task in shape.tasks
    }
    adam = torch.optim.Adam(workload.model.parameters(), lr=1e-3)
    return BayesAggWrapper(adam, shared_rep_hook=workload.model.backbone, heads=heads, rule=rule)


def make_head(task: Task, module: nn.Module) -> AnyHead:
    """The library's head of a task, with the paper's exponent, prior variance and noise."""
    noise = {"noise_variance": 1.0} if task.kind == "regression" else {}
    return _HEADS[task.kind](module, s=task.s, prior_variance=task.prior_variance, **noise)


def pretrain(step: Step) -> None:
    """A short epoch of linear scalarization and its end, after which aggregation is active."""
    for _ in range(PRETRAIN_STEPS):
        step.run()
    if isinstance(step.optimizer, BayesAggWrapper):
        step.optimizer.end_epoch()


def is_active(step: Step) -> bool:
    """Whether the wrapper changes the gradients of the shared network at all.

    Compares them with those of the summed losses in the same state; in evaluation mode hooks are
    silent, so the network stays in training mode and both passes see the same batch statistics.
    """
    assert isinstance(step.optimizer, BayesAggWrapper)
    step.optimizer.zero_grad()
    sum(step.workload.losses().values(), torch.zeros(())).backward()
    plain = _shared_gradient(step.workload)
    step.optimizer.zero_grad()
    step.optimizer.backward(step.workload.losses())
    aggregated = _shared_gradient(step.workload)
    step.optimizer.zero_grad()
    return bool((aggregated - plain).norm() > 1e-4 * plain.norm())


def _shared_gradient(workload: Workload) -> Tensor:
    grads = [p.grad for p in workload.model.backbone.parameters() if p.grad is not None]
    return torch.cat([grad.flatten() for grad in grads])


def time_steps(shape: Shape, rounds: int, clock: Clock = "wall") -> dict[str, list[float]]:
    """Seconds per step and round of the arms ``default``, ``paper`` and ``plain``, taking turns.

    Raises:
        RuntimeError: The wrapper still trains by linear scalarization after its first epoch.
    """
    steps = {"default": bayesagg_step(shape), "paper": bayesagg_step(shape, "paper")}
    for step in steps.values():
        pretrain(step)
        if not is_active(step):
            raise RuntimeError(f"{shape.name}: aggregation is not active after the first epoch")
    steps["plain"] = plain_step(shape)
    pretrain(steps["plain"])
    arms = {name: step.run for name, step in steps.items()}
    return interleave(arms, rounds=rounds, warmup=2, clock=clock)

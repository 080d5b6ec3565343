"""Whole training steps: BayesAgg's against plain linear scalarization on the same network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
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


def bayesagg_step(shape: Shape) -> Step:
    """The same network under ``BayesAggWrapper``: ``optimizer.step(losses)``."""
    workload = make_workload(shape)
    optimizer = wrap(workload, shape)

    def run() -> None:
        losses = workload.losses()
        optimizer.zero_grad()
        optimizer.step(losses)

    return Step(workload, optimizer, run)


def wrap(workload: Workload, shape: Shape) -> BayesAggWrapper:
    """The wrapper with the paper's settings for the shape; epochs end when they are told to."""
    heads = {task.name: make_head(task, workload.model.heads[task.name]) for task in shape.tasks}
    adam = torch.optim.Adam(workload.model.parameters(), lr=1e-3)
    return BayesAggWrapper(adam, shared_rep_hook=workload.model.backbone, heads=heads)


def make_head(task: Task, module: nn.Module) -> AnyHead:
    """The library's head of a task, with the task's exponent and prior variance."""
    return _HEADS[task.kind](module, s=task.s, prior_variance=task.prior_variance)


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
    """Seconds per step and round of the arms ``bayesagg`` and ``plain``, taking turns.

    Raises:
        RuntimeError: The wrapper still trains by linear scalarization after its first epoch.
    """
    ours, plain = bayesagg_step(shape), plain_step(shape)
    pretrain(ours)
    pretrain(plain)
    if not is_active(ours):
        raise RuntimeError(f"{shape.name}: aggregation is not active after the first epoch")
    arms = {"bayesagg": ours.run, "plain": plain.run}
    return interleave(arms, rounds=rounds, warmup=2, clock=clock)

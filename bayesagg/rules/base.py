"""What a rule is to the engine: settings and pure functions; all state is in its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bayesagg.heads import Head, LossTask
from bayesagg.memory import Memory
from bayesagg.parallel import Exchange
from bayesagg.reading import Batch

__all__ = ["Key", "Memory", "Plan", "Rule", "uniform_weights"]

Key = tuple[int, ...]  # identity of what a head reads in a step, see bayesagg.reading.Part
Tasks = Mapping[str, Head | LossTask]


@dataclass
class Plan:
    """What a backward pass will do, and what is known once it has run.

    Attributes:
        gradients: by :attr:`bayesagg.reading.Part.key`, ``[N, d]``: what replaces the sum of the
            gradients that the heads send to these features. Empty: linear scalarization.
        weights: by task ``[o]``: what the gradient of each loss is multiplied by, as a share; or
            what says so, when somebody asks.
        loss_weights: by loss without a head: its multiplier, a scalar; 1 where it is not named.
        update: for :meth:`Memory.commit`, which is not called without one.
        heads: weights that heads receive once the pass is over, by task ``[o, D]``, bias last.
        spared: heads whose own gradients are dropped: the posterior sets their weights.
    """

    gradients: dict[Key, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] | Callable[[], dict[str, Tensor]] = field(default_factory=dict)
    loss_weights: dict[str, Tensor] = field(default_factory=dict)
    update: Any = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    spared: tuple[str, ...] = ()


class Rule(Protocol):
    """Frozen settings of a way to combine gradients. Without ``flags``, ranks agree on nothing."""

    name: ClassVar[str]

    def start(
        self, tasks: Tasks, dtype: torch.dtype, seed: int, steps_per_epoch: int | None
    ) -> Any:
        """State before the first step; warns of head settings that the rule does not use."""

    def flags(self, memory: Any, batch: Batch) -> list[bool]:
        """What all ranks must agree on before evidence is summed; of constant length."""
        return []

    def sets(self, head: Head) -> bool:
        """Whether a posterior sets the weights of a head whose loss is its likelihood."""
        return head.readout != "gradient"

    def spared(self, memory: Any) -> tuple[str, ...]:
        """Heads whose weights the posterior sets by now."""
        return ()

    def plan(self, memory: Any, batch: Batch, flags: list[bool], exchange: Exchange) -> Plan:
        """What the backward pass of a batch will do; neither batch nor memory change."""


def uniform_weights(tasks: Tasks, like: Tensor | None = None) -> dict[str, Tensor]:
    """The same share for every output of every task; ``like`` has the dtype and the device."""
    like = torch.zeros(()) if like is None else like
    share = 1 / sum(task.num_tasks for task in tasks.values())
    return {name: like.new_full((task.num_tasks,), share) for name, task in tasks.items()}

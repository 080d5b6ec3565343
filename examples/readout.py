"""The library's read-out for other methods, to tell apart what heads and what weights do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg import LikelihoodRule
from bayesagg.memory import FadingMemory
from bayesagg.parallel import Exchange
from bayesagg.reading import Batch
from bayesagg.rules import Plan
from bayesagg.rules.streaming import own_gradient


@dataclass(frozen=True)
class ReadoutRule(LikelihoodRule):
    """The default rule's memory, prior and posterior means, with gradients weighed by another.

    Args:
        weights: Called in every step after the warm-up: what each task's own gradient is multiplied
            by, by head ``[o]``; ``None``: one, which is linear scalarization.
    """

    weights: Callable[[], Mapping[str, Tensor]] | None = None

    @torch.no_grad()
    def plan(
        self, memory: FadingMemory, batch: Batch, flags: list[bool], exchange: Exchange
    ) -> Plan:
        """The plan of the default rule for the heads; the tasks' own gradients for the rest."""
        plan = super().plan(memory, batch, flags, exchange)
        if not plan.gradients:  # the warm-up
            return plan
        found = (
            self.weights()
            if self.weights
            else {n: torch.ones_like(w) for n, w in plan.weights.items()}
        )
        plan.gradients = {}
        for part in batch.parts:
            rows = torch.cat([head.weights() for head in part.heads])
            own = torch.cat([found[name] for name in part.names])
            own = own if part.gradient.dim() == 2 else own[:, None]  # classes share a weight
            gradient = part.gradient * own.to(part.gradient.dtype)
            gradient = gradient.flatten(1) @ rows.to(gradient.dtype)
            before = plan.gradients.get(part.key)
            plan.gradients[part.key] = gradient if before is None else before + gradient
        total = torch.stack([weight.sum() for weight in found.values()]).sum()
        plan.weights = {name: weight / total for name, weight in found.items()}
        return plan

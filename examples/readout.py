"""The library's read-out for other methods, to tell apart what heads and what weights do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesagg import LikelihoodRule
from bayesagg.rules import Plan


@dataclass(frozen=True)
class ReadoutRule(LikelihoodRule):
    """The default rule's memory, prior and posterior means, with gradients weighed by another.

    Args:
        weights: Called in every step after the warm-up: what each task's own gradient is multiplied
            by, by head ``[o]``; ``None``: one, which is linear scalarization.
    """

    weights: Callable[[], Mapping[str, Tensor]] | None = None

    @torch.no_grad()
    def plan(self, memory: Any, batch: Any, *others: Any) -> Plan:
        """The plan of the default rule for the heads; the tasks' own gradients for the rest."""
        plan = super().plan(memory, batch, *others)
        if not plan.gradients:  # the warm-up
            return plan
        shares = plan.weights() if callable(plan.weights) else plan.weights
        ones = {name: torch.ones_like(weight) for name, weight in shares.items()}
        found = self.weights() if self.weights else ones
        plan.gradients = {}
        for part in batch.parts:
            own = torch.cat([found[name] for name in part.names]).to(part.gradient)
            at_outputs = part.gradient * (own if part.gradient.dim() == 2 else own[:, None])
            gradient = at_outputs.flatten(1) @ torch.cat([head.weights() for head in part.heads])
            before = plan.gradients.get(part.key)
            plan.gradients[part.key] = gradient if before is None else before + gradient
        total = torch.stack([weight.sum() for weight in found.values()]).sum()
        plan.weights = {name: weight / total for name, weight in found.items()}
        return plan

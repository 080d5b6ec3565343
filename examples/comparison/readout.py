"""Methods that weigh losses, with the library's read-out of the heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from examples.methods import BayesAggregation, LinearScalarization
from examples.readout import ReadoutRule
from examples.training import Losses


class Readout(BayesAggregation):
    """A method that weighs losses, with heads that are set as BayesAgg sets them.

    Whatever scalar the method makes of the losses, its derivative with respect to a loss is that
    loss's weight, and parameters of its own (UW's variances) get their gradients.

    Args:
        shared: As of :class:`examples.methods.BayesAggregation`.
        base: The method.
        own: Its settings.
    """

    def __init__(self, *shared: Any, base: type[LinearScalarization], **own: Any) -> None:
        LinearScalarization.__init__(self, *shared)
        self._base = base(*shared, **own)
        self.optimizer, self._left = self._base.optimizer, self.warmup_steps
        self._now: dict[str, Tensor] = {}
        rule = ReadoutRule(warmup=self.warmup_steps, weights=lambda: self._now)
        self._wrap({}, rule=rule)

    def backward(self, losses: Losses) -> None:
        """Fill the gradients: those of the method, without those of the heads."""
        if self._left > 0:
            self._left -= 1
        else:
            values = torch.stack(list(losses.values())).detach().requires_grad_()
            self._base.objective(values).backward()
            assert values.grad is not None
            self._now = {  # the outputs of a vector share the weight of its task
                g.name: part.repeat(
                    1 if g.kind == "multiclass" else len(g.module.weight) // g.tasks
                )
                for g, part in self.by_group(values.grad)
            }
        super().backward(losses)

    def after_step(self, losses_now: Callable[[], Losses]) -> None:
        """What the method does."""
        self._base.after_step(losses_now)

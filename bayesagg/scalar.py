"""One scalar for any loop: a function whose backward pass hands out what was planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

from bayesagg.reading import Batch
from bayesagg.reading.hooks import Slot, unflatten
from bayesagg.rules import Plan

if TYPE_CHECKING:
    from bayesagg.engine import BayesAgg

__all__ = ["Step", "scalar_of"]


class Step:
    """What one scalar carries from the losses to its backward pass.

    Args:
        engine: that learns once the pass has run.
        plan: of the rule.
        batch: whose calls receive the planned gradients.
        known: what reading it has verified of the losses.
    """

    def __init__(
        self, engine: BayesAgg, plan: Plan, batch: Batch, known: Mapping[str, Any]
    ) -> None:
        self.engine, self.plan, self.known = engine, plan, known
        self._planned = _by_slot(plan, batch)
        self._done = False

    def begin(self, factor: Tensor) -> None:
        """The backward pass has reached the scalar."""
        for slot, gradient in self._planned:
            slot.planned, slot.gradient, slot.factor = True, gradient, factor
        engine = Variable._execution_engine
        # Behind the callbacks of DDP and FSDP2, which are queued while the pass runs.
        engine.queue_callback(lambda: engine.queue_callback(self.finish))

    def finish(self) -> None:
        """The backward pass has run; a second one through the same graph teaches nothing new."""
        for slot, _ in self._planned:
            slot.planned, slot.gradient, slot.factor = False, None, None
        if not self._done:
            self._done = True
            self.engine._adopt(self.plan, self.known)


class _Scalar(torch.autograd.Function):
    """The value of the sum; backward, every loss gets the incoming gradient times its weight."""

    @staticmethod
    def forward(
        ctx: Any, step: Step, value: Tensor, weights: Sequence[Tensor | None], *inputs: Tensor
    ) -> Tensor:
        ctx.step, ctx.weights = step, weights
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        ctx.step.begin(factor.detach())
        losses = len(ctx.weights)
        gradients = [
            (factor if weight is None else factor * weight).to(dtype)
            for weight, (_, dtype, _) in zip(ctx.weights, ctx.like[:losses], strict=True)
        ]
        for shape, dtype, device in ctx.like[losses:]:
            gradients.append(torch.zeros(shape, dtype=dtype, device=device))
        return None, None, None, *gradients


def scalar_of(step: Step, batch: Batch, waiting: Sequence[Tensor]) -> Tensor:
    """The scalar of a step.

    Args:
        step: what its backward pass does.
        batch: its losses.
        waiting: tensors that take part with a gradient of zero.
    """
    weights = [step.plan.loss_weights.get(name) for name in batch.losses]
    scalar: Tensor = _Scalar.apply(
        step, batch.total.detach(), weights, *batch.losses.values(), *waiting
    )
    return scalar


def _by_slot(plan: Plan, batch: Batch) -> list[tuple[Slot, Tensor | None]]:
    """Which gradient every tap hands on: the first head that reads a tensor carries that of all."""
    found: list[tuple[Slot, Tensor | None]] = []
    carried = set()
    for part in batch.parts:
        if part.key not in plan.gradients:
            continue
        for name, head in zip(part.names, part.heads, strict=True):
            calls = part.calls[name]
            rows: Sequence[Tensor | None] = [None] * len(calls)
            if part.key not in carried:
                carried.add(part.key)
                sizes = [c.features.numel() // head.in_features for c in calls]
                rows = (
                    plan.gradients[part.key].split(sizes)
                    if len(calls) > 1
                    else [plan.gradients[part.key]]
                )
            for call, gradient in zip(calls, rows, strict=True):
                if call.slot is None:
                    continue
                shaped = None
                if gradient is not None:
                    least = torch.promote_types(call.features.dtype, torch.float32)
                    gradient = gradient.to(least)
                    shaped = unflatten(gradient, call.features, head.channels_first)
                found.append((call.slot, shaped))
    return found

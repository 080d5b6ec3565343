"""One scalar for any loop: a function whose backward pass hands out what was planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Variable

from bayesagg.heads import Head
from bayesagg.reading import Batch
from bayesagg.reading.hooks import Call, Slot, unflatten
from bayesagg.rules import Plan
from bayesagg.rules.base import Key

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
        watched: somebody waits for the gradients of all heads' parameters.

    Attributes:
        skipped: heads that the pass goes around: it starts at their features.
        planned: what every tap hands on.
        direct: features that receive a gradient from the scalar itself, and that gradient.
    """

    def __init__(
        self, engine: BayesAgg, plan: Plan, batch: Batch, known: Mapping[str, Any], watched: bool
    ) -> None:
        self.engine, self.plan, self.known = engine, plan, known
        self.skipped: set[str] = set()
        self.planned: list[tuple[Slot, Tensor | None]] = []
        self.direct: list[tuple[Tensor, Tensor]] = []
        kept = plan.gradients if watched else _kept(plan, batch)
        carried = set()
        for part in batch.parts:
            gradient = plan.gradients.get(part.key)
            if gradient is None:
                continue
            calls = part.calls[part.names[0]]
            rows: list[Any] = [None] * len(calls)
            if part.key not in carried:  # it carries the gradient of all that read the same
                carried.add(part.key)
                rows = _rows(gradient, calls, part.heads[0])
            if part.key not in kept:
                self.skipped.update(part.names)
                if rows[0] is not None:
                    self.direct += zip([call.features for call in calls], rows, strict=True)
                continue
            for name in part.names:
                pairs = zip([call.slot for call in part.calls[name]], rows, strict=True)
                self.planned += [(slot, row) for slot, row in pairs if slot is not None]
                rows = [None] * len(calls)
        self._done = False

    def begin(self, factor: Tensor) -> None:
        """The backward pass has reached the scalar."""
        for slot, gradient in self.planned:
            slot.planned, slot.gradient, slot.factor = True, gradient, factor
        engine = Variable._execution_engine
        # Behind the callbacks of DDP and FSDP2, which are queued while the pass runs.
        engine.queue_callback(lambda: engine.queue_callback(self.finish))

    def finish(self) -> None:
        """The backward pass has run; a second one through the same graph teaches nothing new."""
        for slot, _ in self.planned:
            slot.planned, slot.gradient, slot.factor = False, None, None
        if not self._done:
            self._done = True
            self.engine._adopt(self.plan, self.known)


def _kept(plan: Plan, batch: Batch) -> set[Key]:
    """Keys of heads that the backward pass goes through: somebody would notice if it did not.

    Of others the weights come from the posterior, their losses lead nowhere else, all that read the
    same features are such, and no hook waits at them.
    """
    spared = batch.alone.intersection(plan.spared)
    kept = set()
    for part in batch.parts:
        for name, head in zip(part.names, part.heads, strict=True):
            linear = head.linear
            if (
                name not in spared
                or linear._backward_hooks
                or linear._backward_pre_hooks
                or any([_noticed(call) for call in part.calls[name]])
            ):
                kept.add(part.key)
    return kept


def _noticed(call: Call) -> bool:
    output = call.output
    return call.slot is None or output.retains_grad or bool(output._backward_hooks)


def _rows(gradient: Tensor, calls: Sequence[Call], head: Head) -> list[Tensor]:
    """A gradient at the features of some calls, as they are; float32 at least."""
    sizes = [call.features.numel() // head.in_features for call in calls]
    found = []
    for call, rows in zip(calls, gradient.split_with_sizes(sizes), strict=True):
        if rows.dtype != call.features.dtype:
            rows = rows.to(torch.promote_types(call.features.dtype, torch.float32))
        found.append(unflatten(rows, call.features, head.channels_first))
    return found


class _Scalar(torch.autograd.Function):
    """The value of the sum; backward, every loss gets the incoming gradient times its weight.

    Features that the pass starts at get their planned gradient times the incoming one.
    """

    @staticmethod
    def forward(
        ctx: Any, step: Step, value: Tensor, weights: Sequence[Tensor | None], *inputs: Tensor
    ) -> Tensor:
        ctx.step, ctx.weights = step, weights
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        step, weights = ctx.step, ctx.weights
        step.begin(factor.detach())
        gradients = [factor if weight is None else factor * weight for weight in weights]
        gradients += [planned * factor.to(planned.dtype) for _, planned in step.direct]
        gradients = [
            gradient if gradient.dtype == dtype else gradient.to(dtype)
            for gradient, (_, dtype, _) in zip(gradients, ctx.like, strict=False)
        ]
        for shape, dtype, device in ctx.like[len(gradients) :]:
            gradients.append(torch.zeros(shape, dtype=dtype, device=device))
        return None, None, None, *gradients


def scalar_of(step: Step, batch: Batch, waiting: Sequence[Tensor]) -> Tensor:
    """The scalar of a step.

    Args:
        step: what its backward pass does.
        batch: its losses.
        waiting: tensors that take part with a gradient of zero.
    """
    losses = [name for name in batch.losses if name not in step.skipped]
    weights = [step.plan.loss_weights.get(name) for name in losses]
    inputs = [batch.losses[name] for name in losses] + [features for features, _ in step.direct]
    scalar: Tensor = _Scalar.apply(step, batch.total.detach(), weights, *inputs, *waiting)
    return scalar

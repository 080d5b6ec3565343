"""A backward pass that hands out what was planned: at once, or that of one scalar for any loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from bayesagg.errors import LossError
from bayesagg.heads import Head
from bayesagg.reading import Batch
from bayesagg.reading.hooks import Call, Slot, unflatten
from bayesagg.rules import Plan
from bayesagg.rules.base import Key

__all__ = ["Step"]

Adopt = Callable[[Plan, Mapping[str, Any] | None], None]


class Step:
    """A plan on its way from the losses to the backward pass, as a scalar or at once.

    Args:
        adopt: called with plan and ``known`` when the pass has run, with ``None`` if again.
        plan: of the rule.
        batch: whose calls receive the planned gradients.
        known: what reading it has verified of the losses.
        watched: somebody waits for the gradients of all heads' parameters.
        waiting: tensors that take part with a gradient of zero.

    Attributes:
        total: the value of the sum.
        roots: where the pass starts, and with what gradient; ``None``: one. It goes around heads
            that nobody would notice, and starts at their features.
        planned: what every tap hands on.
    """

    def __init__(
        self,
        adopt: Adopt,
        plan: Plan,
        batch: Batch,
        known: Mapping[str, Any],
        watched: bool,
        waiting: Sequence[Tensor],
    ) -> None:
        self.adopt, self.plan, self.known = adopt, plan, known
        self.total = batch.total.detach()
        self.planned: list[tuple[Slot, Tensor | None]] = []
        self._passed: list[Head] = []  # that it goes around
        direct: list[tuple[Tensor, Tensor]] = []
        losses = dict(batch.losses)
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
                self._passed += part.heads
                for name in part.names:
                    del losses[name]
                if rows[0] is not None:
                    direct += zip([call.features for call in calls], rows, strict=True)
                continue
            for name in part.names:
                pairs = zip([call.slot for call in part.calls[name]], rows, strict=True)
                self.planned += [(slot, row) for slot, row in pairs if slot is not None]
                rows = [None] * len(calls)
        self.roots: list[tuple[Tensor, Tensor | None]] = [
            *[(loss, plan.loss_weights.get(name)) for name, loss in losses.items()],
            *direct,
            *[(tensor, torch.zeros_like(tensor)) for tensor in waiting],
        ]
        self._done = False

    def scalar(self) -> Tensor:
        """The sum of the losses, whose backward pass carries the plan."""
        # Nothing is learned from the gradients of inferred heads, but they may be asked for.
        for head in self._passed:
            own = [parameter for parameter in head.parameters() if parameter.requires_grad]
            self.roots += [(parameter, torch.zeros_like(parameter)) for parameter in own]
        scalar: Tensor = _Scalar.apply(self, *[root for root, _ in self.roots])
        return scalar

    def backward(self) -> Tensor:
        """The backward pass of :meth:`scalar`, without it; returns the sum of the losses."""
        self.begin(None)
        torch.autograd.backward([root for root, _ in self.roots], self.gradients(None))
        self.finish()
        return self.total

    def gradients(self, factor: Tensor | None) -> list[Tensor | None]:
        """What every root receives, times the incoming gradient; ``None``: one."""
        found = []
        for root, own in self.roots:
            gradient = factor if own is None else own
            if own is not None and factor is not None:
                gradient = own * factor.to(own.dtype)
            if gradient is not None and gradient.dtype != root.dtype:
                gradient = gradient.to(root.dtype)
            found.append(gradient)
        return found

    def begin(self, factor: Tensor | None) -> None:
        """The backward pass is about to reach the heads."""
        for slot, gradient in self.planned:
            slot.planned, slot.gradient, slot.factor = True, gradient, factor

    def finish(self) -> None:
        """The backward pass has run; a second one through the same graph teaches nothing new."""
        for slot, _ in self.planned:
            slot.planned, slot.gradient, slot.factor = False, None, None
        self.adopt(self.plan, None if self._done else self.known)
        self._done = True


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
    """The value of the sum; backward, every root gets its gradient times the incoming one."""

    @staticmethod
    def forward(ctx: Any, step: Step, *roots: Tensor) -> Tensor:
        ctx.step = step
        return step.total.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise LossError(
                "the scalar of the losses was differentiated with create_graph=True, as for second "
                "derivatives, in which the aggregate would be a constant: they would be wrong. "
                "Differentiate the plain losses for those; optimizers that ask for them "
                "(AdaHessian) and meta-gradients are not served."
            )
        step, factor = ctx.step, factor.detach()
        step.begin(factor)
        engine = Variable._execution_engine
        # Behind the callbacks of DDP and FSDP2, which are queued while the pass runs.
        engine.queue_callback(lambda: engine.queue_callback(step.finish))
        return None, *step.gradients(factor)

"""What is no setting of the default rule: ablations of its functions, its read-out for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from bayesagg import LikelihoodRule
from bayesagg.rules import Plan, gradients, streaming
from examples.methods import BayesAggregation, LinearScalarization
from examples.training import Losses


class _Replaced(LikelihoodRule):
    """The default rule with a function of one of its modules changed."""

    module: ClassVar[ModuleType]
    function: ClassVar[str]
    change: ClassVar[Callable[..., Any]]  # called with what the function gives, and its arguments

    def plan(self, *arguments: Any) -> Plan:
        """As of the base."""
        own = getattr(self.module, self.function)

        def changed(*given: Any) -> Any:
            return self.change(own(*given), *given)

        with mock.patch.object(self.module, self.function, changed):
            return super().plan(*arguments)


class InSampleRule(_Replaced):
    """Predictions of the posterior that has seen the datum."""

    module, function = gradients, "leave_one_out"

    @staticmethod
    def change(found: Any, *given: Any) -> Any:
        """With the residual of the whole posterior in place of that without the datum."""
        return replace(
            found, residual=found.residual * found.rest, rest=torch.ones_like(found.rest)
        )


class PriorInNoiseRule(_Replaced):
    """With prior ``N(0, τ²)`` for every regression, in units of its noise."""

    module, function = streaming, "scales_and_ridges"

    @staticmethod
    def change(found: Any, frame: Any, exact: int, *given: Any) -> Any:
        """A ridge of 1 for every regression, however noisy."""
        scale, ridge = found
        fixed = torch.ones_like(ridge[:, :exact])
        return scale, torch.cat([fixed, ridge[:, exact:]], 1)


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
        if plan.update.due is not None:  # the warm-up
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

"""The updates that all comparisons share: linear and scale-invariant scalarization, BayesAgg.

A method is built from a model and the settings that all methods share. Every update steps through
:meth:`LinearScalarization.step`, which has the warm-up and the clipping, so that no method has them
to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg import BayesAggWrapper, BinaryHead, LikelihoodRule, MulticlassHead, RegressionHead
from bayesagg.heads import Head
from bayesagg.rules import PaperRule
from examples.training import Losses, TrainSettings

HEADS: dict[str, type[Head]] = {
    head.kind: head for head in (RegressionHead, BinaryHead, MulticlassHead)
}
HeadSettings = Mapping[str, Mapping[str, Any]]  # by kind of head
_PIXELS = 1024  # of a batch of maps, from which the paper's rule takes posterior and moments


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that every method uses (``fused`` changes its speed only)."""
    shared = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **shared)
    return torch.optim.Adam(model.parameters(), **shared)


def clip_gradients(model: nn.Module, norm: float) -> None:
    """Scale the gradients down to ``norm``; those of each network by itself where there are many.

    A model of independent networks has them as ``networks``: what one does must not depend on the
    others.
    """
    for network in getattr(model, "networks", [model]):
        nn.utils.clip_grad_norm_(network.parameters(), norm)


class LinearScalarization:
    """Minimise the sum of the losses; the base of the other updates.

    The first steps minimise the sum whatever the method, and have weights of one.

    Args:
        model: Its parameters are trained.
        settings: What all methods share.
        steps_per_epoch: Steps in an epoch.
    """

    weighted = False  # whether task_weights() has something to say

    def __init__(self, model: Any, settings: TrainSettings, steps_per_epoch: int) -> None:
        self.model, self.settings, self.steps_per_epoch = model, settings, steps_per_epoch
        self.optimizer = make_optimizer(model, settings)
        self.warmup_steps = settings.warmup_steps
        self.weights: Tensor | None = None

    @property
    def tasks(self) -> int:
        """Number of tasks, K."""
        return sum(group.tasks for group in self.model.groups)

    def step(self, losses: Losses) -> None:
        """Compute gradients, clip them and step."""
        self.optimizer.zero_grad()
        self.warming_up = self.warmup_steps > 0
        if self.warming_up:
            self.warmup_steps -= 1
            values = torch.stack(list(losses.values()))
            self.weights = torch.ones_like(values)
            values.sum().backward()
        else:
            self.backward(losses)
        if self.settings.clip_norm is not None:
            clip_gradients(self.model, self.settings.clip_norm)
        self.optimizer.step()

    def backward(self, losses: Losses) -> None:
        """Fill the gradients."""
        self.objective(torch.stack(list(losses.values()))).backward()

    def objective(self, values: Tensor) -> Tensor:
        """A scalar from the losses, shape ``(K,)``; sets ``weights``."""
        self.weights = self.weigh(values.detach())
        return (self.weights * values).sum()

    def weigh(self, values: Tensor) -> Tensor:
        """Weights of the losses, shape ``(K,)``."""
        return torch.ones_like(values)

    def after_step(self, losses_now: Callable[[], Losses]) -> None:
        """Look at what the step did; ``losses_now`` computes the losses of its batch again."""

    def task_weights(self) -> Tensor | None:
        """Weights of the tasks in the last step, shape ``(K,)``; ``None``: all are always equal."""
        return self.weights if self.weighted else None


class ScaleInvariant(LinearScalarization):
    """Minimise the sum of the logarithms of the losses, so the weight of a task is 1 / its loss."""

    weighted = True

    def objective(self, values: Tensor) -> Tensor:
        """Sum of the log losses."""
        self.weights = 1 / values.detach()
        return values.log().sum()


class BayesAggregation(LinearScalarization):
    """BayesAgg; by default the wrapper gets its three arguments, and nothing else.

    The warm-up is the rule's own, which reads the labels already. Where the settings have another
    one than the rule by default, the rule gets it, so that all methods have the same.

    Args:
        shared: As of :class:`LinearScalarization`; the model has a ``backbone`` and ``groups``.
        rule: With other settings than the default, for ablations.
        heads: Settings of the heads of each kind.
        memory: Of the rule, in multiples of the number of weights of an output.
    """

    weighted = True
    optimizer: BayesAggWrapper

    def __init__(
        self,
        *shared: Any,
        rule: LikelihoodRule | None = None,
        heads: HeadSettings | None = None,
        memory: int | None = None,
    ) -> None:
        super().__init__(*shared)
        rule = rule or LikelihoodRule()
        if rule.warmup == LikelihoodRule.warmup:
            rule = replace(rule, warmup=self.settings.warmup_steps)
        if memory is not None:
            linear = self.model.groups[0].module
            rule = replace(rule, memory=memory * (linear.weight.shape[1] + 1))
        self._wrap(heads, **({} if rule == LikelihoodRule() else {"rule": rule}))

    def _wrap(self, heads: HeadSettings | None, **own: Any) -> None:
        self.groups, heads = self.model.groups, heads or {}
        self.optimizer = BayesAggWrapper(
            self.optimizer,
            self.model.backbone,
            {g.name: HEADS[g.kind](g.module, **heads.get(g.kind, {})) for g in self.groups},
            **own,
        )
        self.warmup_steps = 0

    def backward(self, losses: Losses) -> None:
        """Fill the gradients: a head with several tasks has the sum of their losses."""
        parts = self.by_group(torch.stack(list(losses.values())))
        self.optimizer.backward({group.name: part.sum() for group, part in parts})

    def by_group(self, values: Tensor) -> list[tuple[Any, Tensor]]:
        """Heads, and the values of their tasks, from those of all tasks, ``(K,)``."""
        parts = values.split([group.tasks for group in self.groups])
        return list(zip(self.groups, parts, strict=True))

    def task_weights(self) -> Tensor:
        """Mean weights of the tasks in the last batch, shape ``(K,)``."""
        weights = self.optimizer.task_weights
        return torch.cat([weights[g.name].view(g.tasks, -1).mean(1) for g in self.groups])


class PaperAggregation(BayesAggregation):
    """The paper's rule, with its own epochs of linear scalarization first.

    Args:
        shared: As of :class:`BayesAggregation`; heads too.
        rule: Settings of the rule.
        epochs: Of the training that the rule's ``pretrain_epochs`` belong to; a shorter training
            has the same share of them, but one at least.
    """

    def __init__(
        self, *shared: Any, rule: PaperRule, heads: HeadSettings | None = None, epochs: int
    ) -> None:
        LinearScalarization.__init__(self, *shared)
        share = rule.pretrain_epochs / epochs
        rule = replace(rule, pretrain_epochs=max(1, round(share * self.settings.epochs)))
        if any(group.module.weight.dim() > 2 for group in self.model.groups):
            rule = replace(rule, max_data=_PIXELS)
        self._wrap(heads, rule=rule, steps_per_epoch=self.steps_per_epoch)

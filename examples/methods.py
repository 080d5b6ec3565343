"""The updates that all comparisons share, and the methods of the demo by name.

A method is built from a model and the settings that all methods share. Every update steps through
:meth:`LinearScalarization.step`, which has the warm-up and the clipping, so that no method has them
to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.heads import Head
from bayesagg.presets import PAPER
from examples.training import Losses, TrainSettings, Update

HEADS: dict[str, type[Head]] = {
    head.kind: head for head in (RegressionHead, BinaryHead, MulticlassHead)
}


def adam(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam as every method uses it (``fused`` changes its speed only)."""
    return torch.optim.Adam(
        model.parameters(),
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def clip_gradients(model: nn.Module, norm: float | None) -> None:
    """Scale the gradients down to ``norm``; those of each network by itself where there are many.

    A model of independent networks says so by a method ``network_gradients``: what one network
    does must not depend on the others.
    """
    if norm is None:
        return
    split = getattr(model, "network_gradients", None)
    own = [p.grad for p in model.parameters() if p.grad is not None]
    for gradients in split() if split else [own]:
        total = torch.nn.utils.get_total_norm(gradients)
        scale = (norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)


class LinearScalarization:
    """Minimise the sum of the losses; the base of the other updates.

    The first epochs minimise the sum whatever the method, and have weights of one.

    Args:
        model: Its parameters are trained.
        settings: What all methods share.
        steps_per_epoch: Steps in an epoch.
    """

    weighted = False  # whether task_weights() has something to say

    def __init__(self, model: Any, settings: TrainSettings, steps_per_epoch: int) -> None:
        self.model, self.settings = model, settings
        self.optimizer = adam(model, settings)
        self.warmup_steps = settings.pretrain_epochs * steps_per_epoch
        self.weights: Tensor | None = None

    def step(self, losses: Losses) -> None:
        """Compute gradients, clip them and step."""
        self.optimizer.zero_grad()
        if self.warmup_steps > 0:
            self.warmup_steps -= 1
            values = torch.stack(list(losses.values()))
            self.weights = torch.ones_like(values)
            values.sum().backward()
        else:
            self.backward(losses)
        clip_gradients(self.model, self.settings.clip_norm)
        self.optimizer.step()

    def backward(self, losses: Losses) -> None:
        """Fill the gradients."""
        self.objective(torch.stack(list(losses.values()))).backward()

    def objective(self, values: Tensor) -> Tensor:
        """A scalar from the losses, shape ``(K,)``; sets ``weights``."""
        self.weights = torch.ones_like(values)
        return values.sum()

    def after_step(self, losses_now: Callable[[], Losses]) -> None:
        """Do nothing."""

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
    """BayesAgg with the given settings of the wrapper and of the heads of each kind."""

    weighted = True
    optimizer: BayesAggWrapper

    def __init__(
        self,
        model: Any,
        settings: TrainSettings,
        steps_per_epoch: int,
        wrapper: Mapping[str, Any],
        heads: Mapping[str, Mapping[str, Any]],
    ) -> None:
        super().__init__(model, settings, steps_per_epoch)
        self.groups = model.groups
        self.optimizer = BayesAggWrapper(
            self.optimizer,
            shared_rep_hook=model.backbone,
            heads={
                group.name: HEADS[group.kind](group.module, **heads.get(group.kind, {}))
                for group in self.groups
            },
            steps_per_epoch=steps_per_epoch,
            pretrain_epochs=settings.pretrain_epochs,
            **wrapper,
        )
        self.warmup_steps = 0  # the wrapper has its own, in which it reads the labels already

    def backward(self, losses: Losses) -> None:
        """Fill the gradients: a head with several tasks has the sum of their losses."""
        values, grouped, start = list(losses.values()), {}, 0
        for group in self.groups:
            grouped[group.name] = torch.stack(values[start : start + group.tasks]).sum()
            start += group.tasks
        self.optimizer.backward(grouped)

    def task_weights(self) -> Tensor:
        """Mean weights of the tasks in the last batch, shape ``(K,)``."""
        weights = self.optimizer.task_weights
        return torch.cat([weights[group.name] for group in self.groups])


def library_settings(
    wrapper: Mapping[str, Any], heads: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Settings of the wrapper, and of the heads by kind, with the library's defaults filled in."""
    shared = ("optimizer", "shared_rep_hook", "heads", "steps_per_epoch", "pretrain_epochs")
    parameters = inspect.signature(BayesAggWrapper).parameters.values()
    full = {
        "wrapper": {p.name: p.default for p in parameters if p.name not in shared} | {**wrapper}
    }
    for kind, given in heads.items():
        own = [f for f in fields(HEADS[kind]) if f.kw_only and f.init and f.name != "_"]
        full[kind] = {f.name: f.default for f in own} | {**given}
    # Text where JSON has no such type (a torch.dtype).
    return {
        name: {k: v if isinstance(v, int | float) else str(v) for k, v in part.items()}
        for name, part in full.items()
    }


@dataclass(frozen=True)
class Method:
    """An entry of the demo.

    Attributes:
        label: Name in tables and figures.
        build: Makes the update from a model, shared settings and the number of steps per epoch.
        settings: What this method adds to the shared settings, for the record.
        ablation_of: Name of the method this is with ``s = 0``.
    """

    label: str
    build: Callable[..., Update]
    settings: dict[str, Any] = field(default_factory=dict)
    ablation_of: str | None = None


def _bayesagg(
    label: str, wrapper: dict[str, Any], head: dict[str, Any], ablation_of: str | None = None
) -> Method:
    """A method of the wrapper; what is not given is the library's default, and recorded too."""
    heads = {"regression": head}
    recorded = library_settings(wrapper, heads)
    return Method(
        label=label,
        build=partial(BayesAggregation, wrapper=wrapper, heads=heads),
        settings=recorded["wrapper"] | recorded["regression"],
        ablation_of=ablation_of,
    )


# Eq. 7 as printed (an average over tasks). The pre-training is that of every arm, not the preset's.
_PAPER = {key: v for key, v in PAPER["qm9"].wrapper.items() if key != "pretrain_epochs"}
_PAPER_HEAD = PAPER["qm9"].regression

METHODS = {
    "ls": Method("LS", LinearScalarization),
    "si": Method("SI", ScaleInvariant),
    "bayesagg-paper": _bayesagg("BayesAgg, paper", _PAPER, _PAPER_HEAD),
    "bayesagg-paper-s0": _bayesagg(
        "BayesAgg, paper, s = 0", _PAPER, {**_PAPER_HEAD, "s": 0.0}, "bayesagg-paper"
    ),
    "bayesagg": _bayesagg("BayesAgg", {}, {}),
}

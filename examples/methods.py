"""The methods of the demo by name: how each turns the losses of a batch into a step.

A method is built from a model and the settings that all methods share; to add one, write an update
(:class:`examples.training.Update`) and an entry of :data:`METHODS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg import BayesAggWrapper, RegressionHead
from bayesagg.presets import PAPER
from examples.models import MultiTaskNet
from examples.training import Losses, TrainSettings, Update


def adam(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Adam as every method uses it (``fused`` changes its speed only)."""
    return torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)


class LinearScalarization:
    """Minimise the sum of the losses."""

    def __init__(self, model: nn.Module, settings: TrainSettings, steps_per_epoch: int) -> None:
        self.optimizer = adam(model, settings)

    def step(self, losses: Losses) -> None:
        """Take a step down the gradient of the objective."""
        self.optimizer.zero_grad()
        self.objective(losses).backward()
        self.optimizer.step()

    def objective(self, losses: Losses) -> Tensor:
        """Sum of the losses, a scalar."""
        return torch.stack(list(losses.values())).sum()

    def task_weights(self) -> Tensor | None:
        """No weights: all are equal."""
        return None


class ScaleInvariant(LinearScalarization):
    """Minimise the sum of the logarithms of the losses, so the weight of a task is 1 / its loss."""

    def __init__(self, model: nn.Module, settings: TrainSettings, steps_per_epoch: int) -> None:
        super().__init__(model, settings, steps_per_epoch)
        self._pretrain_steps = settings.pretrain_epochs * steps_per_epoch

    def objective(self, losses: Losses) -> Tensor:
        """Sum of the log losses, a scalar; of the losses during the first epochs."""
        values = torch.stack(list(losses.values()))
        if self._pretrain_steps > 0:
            self._pretrain_steps -= 1
            self._weights = torch.ones_like(values)
            return values.sum()
        self._weights = 1 / values.detach()
        return values.log().sum()

    def task_weights(self) -> Tensor:
        """Inverse losses of the last batch (ones during the first epochs), shape ``(K,)``."""
        return self._weights


class BayesAggregation:
    """BayesAgg of regression tasks, with the given settings of the wrapper and of its head."""

    def __init__(
        self,
        model: MultiTaskNet,
        settings: TrainSettings,
        steps_per_epoch: int,
        wrapper: dict[str, Any],
        head: dict[str, Any],
    ) -> None:
        self.optimizer = BayesAggWrapper(
            adam(model, settings),
            shared_rep_hook=model.backbone,
            heads={"tasks": RegressionHead(model.head, **head)},
            steps_per_epoch=steps_per_epoch,
            pretrain_epochs=settings.pretrain_epochs,
            **wrapper,
        )

    def step(self, losses: Losses) -> None:
        """Take a step down the aggregated gradient."""
        self.optimizer.zero_grad()
        # One head has all tasks as its outputs, so its loss is the sum of theirs.
        self.optimizer.step({"tasks": torch.stack(list(losses.values())).sum()})

    def task_weights(self) -> Tensor:
        """Mean weights of the tasks in the last batch, shape ``(K,)``."""
        return self.optimizer.task_weights["tasks"]


@dataclass(frozen=True)
class Method:
    """An entry of the comparison.

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
    shared = ("optimizer", "shared_rep_hook", "heads", "steps_per_epoch", "pretrain_epochs")
    parameters = inspect.signature(BayesAggWrapper).parameters.values()
    settings = {p.name: p.default for p in parameters if p.name not in shared} | wrapper
    settings |= {f.name: f.default for f in fields(RegressionHead) if f.kw_only and f.name != "_"}
    settings |= head
    return Method(
        label=label,
        build=partial(BayesAggregation, wrapper=wrapper, head=head),
        # Text where JSON has no such type (a torch.dtype).
        settings={k: v if isinstance(v, int | float) else str(v) for k, v in settings.items()},
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
    "bayesagg-s0": _bayesagg("BayesAgg, s = 0", {}, {"s": 0.0}, "bayesagg"),
}

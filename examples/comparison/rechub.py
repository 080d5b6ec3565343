"""Networks and methods of torch-rechub 0.9.0, in the loop that all methods share.

What a method of its does beside the losses (which layers are shared, weights and their start) is
its trainer's, built around the network but not run: data, schedule and the epoch that is evaluated
are those of the comparison.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from examples.comparison.networks import last_layers
from examples.comparison.tasks import HeadGroup, Outputs, Task, grouped
from examples.methods import LinearScalarization
from examples.training import Losses


def _module(name: str) -> Any:
    return importlib.import_module(f"torch_rechub.{name}")  # takes seconds


class RecommenderNet(nn.Module):
    """MMoE or PLE on embeddings of categories; a tower per task.

    The networks are told that all tasks are regressions: of a binary task they then give the logit.

    Args:
        name: ``MMOE`` or ``PLE``.
        categories: Number of values of each feature, by name.
        dimensions: Of an embedding.
        tower: Width of the hidden layer of a tower.
        tasks: Tasks, sorted by kind; one output each.
        experts: Arguments of the network.
    """

    backbone = None  # there is no tensor that all heads read

    def __init__(
        self,
        name: str,
        categories: dict[str, int],
        dimensions: int,
        tower: int,
        tasks: Sequence[Task],
        **experts: Any,
    ) -> None:
        super().__init__()
        feature = _module("basic.features").SparseFeature
        features = [feature(key, count, dimensions) for key, count in categories.items()]
        self.kinds = ["regression"] * len(tasks)
        towers = [{"dims": [tower]} for _ in tasks]
        make = getattr(_module("models.multi_task"), name)
        self.network = make(features, self.kinds, tower_params_list=towers, **experts)
        self._categories, self._tasks = list(categories), tasks

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The last layers of the towers, one per task."""
        return last_layers(self._tasks, [tower.mlp for tower in self.network.towers])

    def forward(self, x: Tensor) -> Outputs:
        """Outputs by kind, each ``(B, outputs)``, from a column per feature."""
        found = self.network(dict(zip(self._categories, x.unbind(1), strict=True)))
        return {name: found[:, which] for name, _, which in grouped(self._tasks)}


class Adaptive(LinearScalarization):
    """The base: a trainer of torch-rechub that holds what its method needs, never run."""

    method: ClassVar[str]

    def __init__(self, model: RecommenderNet, *shared: Any) -> None:
        trainer = _module("trainers").MTLTrainer
        # Its loss weights become parameters of the network, which the optimizer then has too.
        self.trainer = trainer(model.network, model.kinds, adaptive_params={"method": self.method})
        super().__init__(model, *shared)


class Uncertainty(Adaptive):
    """``uwl``: the sum of 2 exp(-w) L + w, with learned w held at 0 or above."""

    weighted, method = True, "uwl"

    def objective(self, values: Tensor) -> Tensor:
        """As in ``MTLTrainer.train_one_epoch``, where it stands in the middle of the loop."""
        w = torch.cat(list(self.trainer.loss_weight)).clamp(min=0)
        self.weights = 2 * (-w.detach()).exp()
        return (2 * values * (-w).exp() + w).sum()


class MetaBalance(Adaptive):
    """``metabalance``: shared parameters get gradients whose norms follow the first task's."""

    method = "metabalance"

    def backward(self, losses: Losses) -> None:
        """Fill the gradients by its ``MetaBalance.step``."""
        self.trainer.meta_optimizer.step(list(losses.values()))


class GradNorm(Adaptive):
    """``gradnorm``: weights that bring the tasks' gradient norms to one rate of training.

    The norms are those at the layer that its trainer takes for the last shared one.
    """

    weighted, method = True, "gradnorm"

    def backward(self, losses: Losses) -> None:
        """Fill the gradients, those of the weights too, by its ``gradnorm``."""
        values, own = list(losses.values()), self.trainer
        if own.initial_task_loss is None:
            own.initial_task_loss = [value.item() for value in values]
        self.weights = torch.cat([w.detach().clone() for w in own.loss_weight])
        _module("utils.mtl").gradnorm(
            values, own.loss_weight, own.last_share_layer, own.initial_task_loss, own.alpha
        )

    def step(self, losses: Losses) -> None:
        """Step, and scale the weights to their number."""
        super().step(losses)
        total = sum(w.item() for w in self.trainer.loss_weight)
        for w in self.trainer.loss_weight:
            w.data.mul_(self.tasks / total)

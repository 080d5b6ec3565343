"""Networks with private layers: a tower in front of every head, and experts with gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.comparison.tasks import Outputs, Task, grouped
from examples.models import HeadGroup


class PrivateNet(nn.Module):
    """A tower for every task: a hidden layer and a linear head, which no other task reads.

    Args:
        body: Maps inputs to what each tower receives, K tensors ``(B, width)``.
        width: Dimensions of each.
        tower: Width of the hidden layer.
        tasks: Tasks, sorted by kind.
    """

    backbone = None  # there is no tensor that all heads read

    def __init__(self, body: nn.Module, width: int, tower: int, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.body, self._tasks = body, tasks
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, tower), nn.ELU(), nn.Linear(tower, task.classes))
            for task in tasks
        )

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The last layers of the towers, one per task."""
        return tuple(
            HeadGroup(task.name, task.kind, tower[-1], 1)
            for task, tower in zip(self._tasks, self.towers, strict=True)
        )

    def forward(self, x: Tensor) -> Outputs:
        """Outputs by kind and multi-class task, each ``(B, outputs)``."""
        pairs = zip(self.towers, self.body(x), strict=True)
        outputs = [tower(features) for tower, features in pairs]
        return {name: torch.cat(outputs[which], 1) for name, _, which in grouped(self._tasks)}


class Trunk(nn.Module):
    """ELU layers that all towers read.

    Args:
        inputs: Dimensions of the inputs.
        widths: Of the layers.
        tasks: Number of tasks, K.
    """

    def __init__(self, inputs: int, widths: Sequence[int], tasks: int) -> None:
        super().__init__()
        self.layers, self._tasks = elu_layers(inputs, widths), tasks

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """The same tensor for every task, ``(B, width)``."""
        return [self.layers(x)] * self._tasks


class Experts(nn.Module):
    """MMoE (Ma et al., 2018): every task mixes the same experts by a softmax gate on the inputs.

    The experts are the last of the ELU layers, side by side on the layers before it.

    Args:
        inputs: Dimensions of the inputs.
        widths: Of the layers, the last that of an expert.
        tasks: Number of tasks, K.
        experts: Number of experts, E.
    """

    def __init__(self, inputs: int, widths: Sequence[int], tasks: int, experts: int = 4) -> None:
        super().__init__()
        self.layers = elu_layers(inputs, [*widths[:-1], experts * widths[-1]])
        self.gates = nn.Linear(inputs, tasks * experts)
        self._experts = (experts, widths[-1])
        self._gates = (tasks, experts)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """The mixture of each task, ``(B, width)``."""
        experts = self.layers(x).unflatten(1, self._experts)
        gates = self.gates(x).unflatten(1, self._gates).softmax(2)
        return (gates @ experts).unbind(1)


def elu_layers(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers, an ELU after each."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ELU()]
        inputs = width
    return nn.Sequential(*layers)

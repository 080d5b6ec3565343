"""Networks for tasks of several kinds: with shared and private layers, and one per task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from examples.comparison.tasks import HeadGroup, Outputs, Task, grouped


class TaskNet(nn.Module):
    """A shared backbone with linear heads: one for all tasks of a kind, one per multi-class task.

    Args:
        backbone: Maps inputs to the shared representation, shape ``(B, width)``. Its output is what
            the heads receive.
        width: Dimensions of the shared representation.
        tasks: Tasks, sorted by kind.
        head: Makes a head from the numbers of its inputs and outputs.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        tasks: Sequence[Task],
        head: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict()
        self._kinds = []
        for name, kind, which in grouped(tasks):
            self.heads[name] = head(width, sum(task.classes for task in tasks[which]))
            self._kinds.append((name, kind, len(tasks[which])))

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The heads, in the order of the tasks."""
        return tuple(
            HeadGroup(name, kind, self.heads[name], count) for name, kind, count in self._kinds
        )

    def forward(self, x: Tensor) -> Outputs:
        """Outputs by head, each ``(B, outputs)``, or maps of them."""
        h = self.backbone(x)
        return {name: head(h) for name, head in self.heads.items()}


def dense_layers(
    inputs: int, widths: Sequence[int], activation: type[nn.Module] = nn.ELU
) -> nn.Sequential:
    """Linear layers, an activation after each."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers)


def mlp(inputs: int, widths: Sequence[int], tasks: Sequence[Task]) -> TaskNet:
    """Build an MLP of ELU layers with linear heads."""
    return TaskNet(dense_layers(inputs, widths), widths[-1], tasks)


class Networks(nn.Module):
    """Networks that share no parameter."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)


class SeparateNets(Networks):
    """A network per task; gives what one network for all tasks gives.

    Each network's loss reaches only its own parameters and Adam works element by element, so one
    optimizer on the sum of the losses trains them exactly as an optimizer each would.

    Args:
        networks: A network of one task each, in the order of the tasks.
        tasks: Tasks, sorted by kind.
    """

    def __init__(self, networks: Sequence[nn.Module], tasks: Sequence[Task]) -> None:
        super().__init__(networks)
        self._heads = [(name, which) for name, _, which in grouped(tasks)]

    def forward(self, x: Any) -> Outputs:
        """Outputs by head, each ``(B, outputs)``."""
        outputs = [self.output(network, x) for network in self.networks]
        return {name: torch.cat(outputs[which], 1) for name, which in self._heads}

    @classmethod
    def of(cls, tasks: Sequence[Task], make: Callable[[Sequence[Task]], nn.Module]) -> SeparateNets:
        """A network per task, each with its own random weights, from what makes one for tasks."""
        return cls([make([task]) for task in tasks], tasks)

    def output(self, network: nn.Module, x: Any) -> Tensor:
        """Output of one network, ``(B, outputs)``."""
        return next(iter(network(x).values()))

    def network_tensors(self) -> list[list[Tensor]]:
        """Parameters and buffers of each network."""
        return [list(network.state_dict().values()) for network in self.networks]


def single_task(inputs: int, widths: Sequence[int], tasks: Sequence[Task]) -> SeparateNets:
    """One MLP per task, each with its own random weights."""
    return SeparateNets.of(tasks, partial(mlp, inputs, widths))


def last_layers(tasks: Sequence[Task], towers: Iterable[nn.Sequential]) -> tuple[HeadGroup, ...]:
    """The heads of a network with a tower per task."""
    pairs = zip(tasks, towers, strict=True)
    return tuple(HeadGroup(task.name, task.kind, tower[-1], 1) for task, tower in pairs)


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
        return last_layers(self._tasks, self.towers)

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
        self.layers, self._tasks = dense_layers(inputs, widths), tasks

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
        self.layers = dense_layers(inputs, [*widths[:-1], experts * widths[-1]])
        self.gates = nn.Linear(inputs, tasks * experts)
        self._experts = (experts, widths[-1])
        self._gates = (tasks, experts)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        """The mixture of each task, ``(B, width)``."""
        experts = self.layers(x).unflatten(1, self._experts)
        gates = self.gates(x).unflatten(1, self._gates).softmax(2)
        return (gates @ experts).unbind(1)

"""Networks for tasks of several kinds: with shared layers, and one per task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.comparison.tasks import Outputs, Task, grouped
from examples.models import HeadGroup


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
        self.backbone = backbone
        heads = {}
        for name, _, which in grouped(tasks):
            outputs = sum(task.classes for task in tasks[which])
            heads[name] = head(width, outputs)
        self.heads = nn.ModuleDict(heads)
        self._kinds = [
            (name, kind, which.stop - which.start) for name, kind, which in grouped(tasks)
        ]

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


def mlp(inputs: int, widths: Sequence[int], tasks: Sequence[Task]) -> TaskNet:
    """Build an MLP of ELU layers with linear heads."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ELU()]
        inputs = width
    return TaskNet(nn.Sequential(*layers), inputs, tasks)


class SeparateNets(nn.Module):
    """Networks that share no parameter; gives what one network for all tasks gives.

    Each network's loss reaches only its own parameters and Adam works element by element, so one
    optimizer on the sum of the losses trains them exactly as an optimizer each would.

    Args:
        networks: A network of one task each, in the order of the tasks.
        tasks: Tasks, sorted by kind.
    """

    def __init__(self, networks: Sequence[TaskNet], tasks: Sequence[Task]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._heads = [(name, which) for name, _, which in grouped(tasks)]

    def forward(self, x: Any) -> Outputs:
        """Outputs by head, each ``(B, outputs)``."""
        outputs = [self.output(network, x) for network in self.networks]
        return {name: torch.cat(outputs[which], 1) for name, which in self._heads}

    def output(self, network: nn.Module, x: Any) -> Tensor:
        """Output of one network, ``(B, outputs)``."""
        values: list[Tensor] = list(network(x).values())
        return values[0]

    def network_gradients(self) -> list[list[Tensor]]:
        """Gradients of each network."""
        return [
            [p.grad for p in network.parameters() if p.grad is not None]
            for network in self.networks
        ]

    def network_tensors(self) -> list[list[Tensor]]:
        """Parameters and buffers of each network."""
        return [list(network.state_dict().values()) for network in self.networks]


def single_task(inputs: int, widths: Sequence[int], tasks: Sequence[Task]) -> SeparateNets:
    """One MLP per task, each with its own random weights."""
    return SeparateNets([mlp(inputs, widths, [task]) for task in tasks], tasks)

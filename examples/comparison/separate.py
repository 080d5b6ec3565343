"""Single-task models of any architecture: a network per task, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.comparison.networks import TaskNet
from examples.comparison.tasks import Outputs, Task, grouped


class SeparateNets(nn.Module):
    """Networks that share no parameter; gives what one network for all tasks gives.

    For networks that :class:`examples.comparison.networks.IndependentNets` cannot stack.

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

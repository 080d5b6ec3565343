"""Parts of the networks: descriptions of heads, and layers of many networks at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["regression", "binary", "multiclass"]


class HeadGroup(NamedTuple):
    """A linear head: its name, the kind of its tasks, the layer, and how many tasks it serves.

    Losses follow the order of the groups, and within a group that of its outputs.
    """

    name: str
    kind: Kind
    module: nn.Linear
    tasks: int


class StackedLinear(nn.Module):
    """K linear layers of the same shape: ``(K, B, in)`` to ``(K, B, out)``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        # Stored transposed, because products with transposed stacks copy them first.
        weights = [layer.weight.detach().T for layer in layers]
        self.weight = nn.Parameter(torch.stack(weights).contiguous())
        self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


def stack(layers: Sequence[nn.Module]) -> nn.Module:
    """K layers of the same shape as one that maps ``(K, B, in)`` to ``(K, B, out)``."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linear) == len(layers):
        return StackedLinear(linear)
    if any(True for _ in layers[0].parameters()):
        raise TypeError(
            f"single-task networks are stacked from linear layers and activations, "
            f"not from {type(layers[0]).__name__}"
        )
    return layers[0]

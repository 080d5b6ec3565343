"""Networks of the examples: a shared backbone with heads, and single-task networks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class MultiTaskNet(nn.Module):
    """A shared backbone and a linear head with one output per task.

    One head of K outputs computes what K heads of one output would, in fewer operations.

    Args:
        backbone: Maps inputs to the shared representation, shape ``(B, width)``.
        width: Dimensions of the shared representation.
        tasks: Number of tasks, K.
    """

    def __init__(self, backbone: nn.Module, width: int, tasks: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, tasks)

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The one head, of regression tasks."""
        return (HeadGroup("tasks", "regression", self.head, self.head.out_features),)

    def features(self, x: Tensor) -> Tensor:
        """Shared representation, shape ``(1, B, width)``: one network, B data."""
        h: Tensor = self.backbone(x)
        return h.unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape ``(B, K)``."""
        outputs: Tensor = self.head(self.backbone(x))
        return outputs


class SingleTaskNets(nn.Module):
    """K independent networks, one per task, evaluated together by batched products.

    Their parameters are stacked along a first dimension. Each network's loss reaches only its own
    slices and Adam works element by element, so one optimizer on the sum of the losses trains them
    exactly as K optimizers would. What mixes parameters, such as clipping by the global norm, would
    break this.

    Args:
        networks: K networks of one task each, of the same shape, with a backbone of
            linear layers and element-wise activations; their current weights are copied.

    Raises:
        TypeError: If a backbone has a layer with parameters that is not linear.
    """

    def __init__(self, networks: Sequence[MultiTaskNet]) -> None:
        super().__init__()
        self.tasks = len(networks)
        backbones = [network.backbone.children() for network in networks]
        self.layers = nn.Sequential(*map(stack, zip(*backbones, strict=True)))
        self.head = stack([network.head for network in networks])

    def features(self, x: Tensor) -> Tensor:
        """Representations, shape ``(K, B, width)``."""
        h: Tensor = self.layers(x.expand(self.tasks, *x.shape))
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape ``(B, K)``."""
        outputs: Tensor = self.head(self.features(x)).squeeze(-1).T
        return outputs


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


def mlp(inputs: int, tasks: int) -> MultiTaskNet:
    """Build the network of the demo: an MLP of 256, 256 and 64 ELU units and a linear head."""
    layers: list[nn.Module] = []
    for width in (256, 256, 64):
        layers += [nn.Linear(inputs, width), nn.ELU()]
        inputs = width
    return MultiTaskNet(nn.Sequential(*layers), inputs, tasks)


def single_task(build: Callable[[int], MultiTaskNet], tasks: int) -> SingleTaskNets:
    """Stack one network per task, each with its own random weights."""
    return SingleTaskNets([build(1) for _ in range(tasks)])

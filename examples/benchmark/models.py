"""The networks of the paper's benchmarks, with random data of the right size.

The architectures follow the paper's Appendix B: a message-passing network on complete molecular
graphs (QM9), a CNN of three 160-channel convolutions (CIFAR-MTL), ResNet-34 (ChestX-ray14) and
ResNet-18 (UTKFace) with a 256-dimensional ELU layer. Weights and data are random: only the cost
of a step is measured here, never its accuracy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from examples import image_models
from examples.benchmark.shapes import Shape, Task
from examples.message_passing import EDGE_FEATURES, NODE_FEATURES, MessagePassing

MIN_ATOMS, MAX_ATOMS = 12, 24


class MissingDependencyError(RuntimeError):
    """A network needs a package that is not installed; the message says which."""


def _import(module: str, package: str, shape: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the network of shape {shape!r} needs {package}: run `pip install {package}`, or "
            "leave the shape out with --shapes, or measure --parts aggregation alone"
        ) from error


class MultiHead(nn.Module):
    """A shared backbone and one linear head per task; returns a mapping name → output."""

    def __init__(self, backbone: nn.Module, dim: int, tasks: tuple[Task, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict({task.name: nn.Linear(dim, task.outputs) for task in tasks})

    def forward(self, x: Any) -> dict[str, Tensor]:
        """Outputs (B, o) per task for a batch ``x`` of whatever the backbone takes."""
        h = self.backbone(x)
        return {name: head(h) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Workload:
    """A model with one batch: the input and the target of every task."""

    model: MultiHead
    x: Any
    targets: dict[str, Tensor]
    criteria: dict[str, nn.Module]

    def losses(self) -> dict[str, Tensor]:
        """One forward pass: name → loss averaged over the batch."""
        out = self.model(self.x)
        return {name: self.criteria[name](out[name], self.targets[name]) for name in out}


CRITERIA: dict[str, Callable[[], nn.Module]] = {
    "regression": nn.MSELoss,
    "binary": nn.BCEWithLogitsLoss,
    "multiclass": nn.CrossEntropyLoss,
}


def make_workload(shape: Shape, *, seed: int = 0) -> Workload:
    """Model and batch of ``shape`` (``step_batch`` examples), the same for the same seed.

    Raises:
        MissingDependencyError: The network needs torchvision or torch_geometric, which is not
            installed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone, x = _BACKBONES[shape.backbone](shape)
        model = MultiHead(backbone, shape.dim, shape.tasks)
        targets = {task.name: random_target(task, shape.step_batch) for task in shape.tasks}
    criteria = {task.name: CRITERIA[task.kind]() for task in shape.tasks}
    return Workload(model, x, targets, criteria)


def random_target(task: Task, batch: int) -> Tensor:
    """A target of the shape that the task's loss wants: (B, o) floats or (B,) classes."""
    if task.kind == "regression":
        return torch.randn(batch, task.outputs)
    if task.kind == "binary":
        return (torch.rand(batch, task.outputs) < 0.3).float()
    return torch.randint(task.outputs, (batch,))


def _mlp(shape: Shape) -> tuple[nn.Module, Tensor]:
    layers = (nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, shape.dim), nn.ReLU())
    return nn.Sequential(*layers), torch.randn(shape.step_batch, 128)


def _cnn(shape: Shape) -> tuple[nn.Module, Tensor]:
    return image_models.cnn(shape.dim), torch.randn(shape.step_batch, 3, 32, 32)


def _resnet(name: str, pixels: int) -> Callable[[Shape], tuple[nn.Module, Tensor]]:
    def build(shape: Shape) -> tuple[nn.Module, Tensor]:
        _import("torchvision.models", "torchvision", shape.name)
        network = image_models.resnet(name, shape.dim)
        return network, torch.randn(shape.step_batch, 3, pixels, pixels)

    return build


def _mpnn(shape: Shape) -> tuple[nn.Module, Any]:
    geometric = _import("torch_geometric.nn", "torch_geometric", shape.name)
    data = _import("torch_geometric.data", "torch_geometric", shape.name)
    graphs = [_molecule(data) for _ in range(shape.step_batch)]
    return MessagePassing(shape.dim, geometric), data.Batch.from_data_list(graphs)


def _molecule(data: ModuleType) -> Any:
    """A complete graph of 12 to 24 atoms, 18 on average as in QM9, with random features."""
    atoms = int(torch.randint(MIN_ATOMS, MAX_ATOMS + 1, ()))
    edges = (~torch.eye(atoms, dtype=torch.bool)).nonzero().T.contiguous()
    return data.Data(
        x=torch.randn(atoms, NODE_FEATURES),
        edge_index=edges,
        edge_attr=torch.randn(edges.shape[1], EDGE_FEATURES),
    )


_BACKBONES: dict[str, Callable[[Shape], tuple[nn.Module, Any]]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet18": _resnet("resnet18", 128),
    "resnet34": _resnet("resnet34", 224),
    "mpnn": _mpnn,
}

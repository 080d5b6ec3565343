"""Networks with random data and their steps: only the cost is measured, never the accuracy.

The paper's (Appendix B): a message-passing network on complete molecular graphs (QM9), a CNN of
three 160-channel convolutions (CIFAR-MTL), ResNet-34 (ChestX-ray14) and ResNet-18 (UTKFace) with a
256-dimensional ELU layer. Small ones: an MLP, and a mixture of experts with a gate and a tower for
every task (MMoE; Ma et al., 2018).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, LikelihoodRule, PaperRule
from bayesagg.rules import Rule
from examples import image_models
from examples.benchmark.cases import Case, Task
from examples.comparison.networks import TaskNet, dense_layers
from examples.data import DataUnavailableError
from examples.message_passing import EDGE_FEATURES, NODE_FEATURES, MessagePassing
from examples.methods import HEADS

Network = tuple[nn.Module | None, Callable[[], Any]]
"""A backbone, and what draws a batch of its input."""

INPUTS, EXPERTS, TOWER = 128, 4, 16
_layers = partial(dense_layers, activation=nn.ReLU)
MIN_ATOMS, MAX_ATOMS = 12, 24


class MultiHead(TaskNet):
    """A shared backbone and one linear head per task; returns a mapping name → output."""

    def __init__(self, backbone: nn.Module, dim: int, tasks: tuple[Task, ...]) -> None:
        nn.Module.__init__(self)
        self.backbone = backbone
        self.heads = nn.ModuleDict({task.name: nn.Linear(dim, task.outputs) for task in tasks})
        self._kinds = [(t.name, t.kind, 1 if t.kind == "multiclass" else t.outputs) for t in tasks]


class MixtureOfExperts(nn.Module):
    """Experts that all tasks share, a gate over them and a tower of two layers for each task."""

    backbone = None  # there is no tensor that all heads read

    def __init__(self, dim: int, tasks: tuple[Task, ...]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_layers(INPUTS, (INPUTS, dim)) for _ in range(EXPERTS))
        names = [task.name for task in tasks]
        self.gates = nn.ModuleDict({name: nn.Linear(INPUTS, EXPERTS) for name in names})
        self.towers = nn.ModuleDict({name: _layers(dim, (TOWER,)) for name in names})
        self.heads = nn.ModuleDict({task.name: nn.Linear(TOWER, task.outputs) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Outputs (B, o) per task."""
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = {
            n: torch.bmm(g(x).softmax(1)[:, None], experts)[:, 0] for n, g in self.gates.items()
        }
        return {name: head(self.towers[name](mixed[name])) for name, head in self.heads.items()}


Batch = tuple[Any, dict[str, Tensor]]
"""The input, and the target of every task."""


@dataclass(frozen=True)
class Workload:
    """A model and data: so many batches that its heads cannot fit all of them exactly."""

    model: MultiHead | MixtureOfExperts
    batches: list[Batch]
    kinds: dict[str, str]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """One forward pass: name → loss averaged over the batch."""
        out = self.model(batch[0])
        return {name: CRITERIA[self.kinds[name]](out[name], batch[1][name]) for name in out}


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": F.mse_loss,
    "binary": F.binary_cross_entropy_with_logits,
    "multiclass": F.cross_entropy,
}


def make_workload(case: Case, *, seed: int = 0) -> Workload:
    """Model and batches of a case (``step_batch`` examples each), the same for the same seed.

    Raises:
        DataUnavailableError: The network needs timm or torch_geometric, which is not installed.
    """
    with torch.random.fork_rng(), torch.device(case.device):
        torch.manual_seed(seed)
        backbone, make_input = NETWORKS[case.network](case)
        if backbone is None:
            model = MixtureOfExperts(case.dim, case.tasks)
        else:
            model = MultiHead(backbone, case.dim, case.tasks)
        batches = [
            (make_input(), {task.name: random_target(task, case.step_batch) for task in case.tasks})
            for _ in range(min(16, math.ceil(1024 / case.step_batch)))
        ]
    return Workload(model, batches, {task.name: task.kind for task in case.tasks})


def random_target(task: Task, batch: int) -> Tensor:
    """A target of the shape that the task's loss wants: (B, o) floats or (B,) classes."""
    if task.kind == "regression":
        return torch.randn(batch, task.outputs)
    if task.kind == "binary":
        return (torch.rand(batch, task.outputs) < 0.3).float()
    return torch.randint(task.outputs, (batch,))


def _mlp(case: Case) -> Network:
    return _layers(INPUTS, (INPUTS, case.dim)), partial(torch.randn, case.step_batch, INPUTS)


def _mmoe(case: Case) -> Network:
    return None, partial(torch.randn, case.step_batch, INPUTS)


def _cnn(case: Case) -> Network:
    return image_models.cnn(case.dim), partial(torch.randn, case.step_batch, 3, 32, 32)


def _resnet(case: Case) -> Network:
    pixels = 128 if case.network == "resnet18" else 224
    images = partial(torch.randn, case.step_batch, 3, pixels, pixels)
    return image_models.resnet(case.network, case.dim), images


def _mpnn(case: Case) -> Network:
    try:
        from torch_geometric import data
        from torch_geometric import nn as geometric
    except ImportError as error:
        raise DataUnavailableError(
            f"the network of shape {case.name!r} needs torch_geometric: run `pip install "
            "torch_geometric`, or leave the shape out with --shapes"
        ) from error

    def graphs() -> Any:
        return data.Batch.from_data_list([_molecule(data) for _ in range(case.step_batch)])

    return MessagePassing(case.dim, geometric), graphs


def _molecule(data: ModuleType) -> Any:
    """A complete graph of 12 to 24 atoms, 18 on average as in QM9, with random features."""
    atoms = int(torch.randint(MIN_ATOMS, MAX_ATOMS + 1, ()))
    edges = (~torch.eye(atoms, dtype=torch.bool)).nonzero().T.contiguous()
    x, a = torch.randn(atoms, NODE_FEATURES), torch.randn(edges.shape[1], EDGE_FEATURES)
    return data.Data(x=x, edge_index=edges, edge_attr=a)


NETWORKS: dict[str, Callable[[Case], Network]] = {
    "mlp": _mlp,
    "mmoe": _mmoe,
    "cnn": _cnn,
    "resnet18": _resnet,
    "resnet34": _resnet,
    "mpnn": _mpnn,
}


@dataclass(frozen=True)
class Arm:
    """A way to take a step: plain, or a rule, with or without ``targets=``."""

    rule: str | None = None
    targets: bool = False

    @property
    def name(self) -> str:
        """As it is printed."""
        return "plain" if self.rule is None else self.rule + " + targets" * self.targets


def arms(case: Case) -> list[Arm]:
    """Plain, and every rule; labels are passed too where steps are quick."""
    passed = (False, True) if case.small else (False,)
    return [Arm(), *(Arm(rule, targets) for rule in case.rules for targets in passed)]


def rule_of(case: Case, name: str) -> Rule:
    """Past linear scalarization at once, which is over after 50 steps out of the box.

    The memory is the default's: given, the default rule does not count the data, as it does not
    once it has seen that there are more of them than the batches here.
    """
    if name == "paper":
        return PaperRule(pretrain_epochs=0)
    width = TOWER if case.network == "mmoe" else case.dim
    return LikelihoodRule(warmup=2, memory=20 * (width + 1))


@dataclass(frozen=True)
class Step:
    """A network, its optimizer and the training step that is measured."""

    workload: Workload
    optimizer: torch.optim.Optimizer
    run: Callable[[], None]


def make_step(case: Case, arm: Arm) -> Step:
    """A step in steady state: past linear scalarization and the 40 steps whose labels are kept."""
    workload = make_workload(case)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(workload.model.parameters(), lr=1e-3)
    if arm.rule is not None:
        modules = workload.model.heads
        heads = {task.name: HEADS[task.kind](modules[task.name]) for task in case.tasks}
        backbone, rule = workload.model.backbone, rule_of(case, arm.rule)
        optimizer = BayesAggWrapper(optimizer, backbone, heads, rule=rule)
    batches = itertools.cycle(workload.batches)

    def run() -> None:
        batch = next(batches)
        losses = workload.losses(batch)
        optimizer.zero_grad()
        if isinstance(optimizer, BayesAggWrapper):
            optimizer.step(losses, targets=batch[1] if arm.targets else None)
        else:
            sum(losses.values()).backward()
            optimizer.step()

    for _ in range(45 if case.small else 4):
        run()
    return Step(workload, optimizer, run)

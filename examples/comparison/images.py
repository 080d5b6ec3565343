"""What the image benchmarks have in common: their models, and how a benchmark is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples import image_models
from examples.comparison.benchmark import Benchmark
from examples.comparison.networks import TaskNet
from examples.comparison.tasks import Outputs, Task, grouped
from examples.data import folder, images
from examples.training import Part

Backbone = Callable[[], nn.Module]
SOURCES = (folder, images, image_models)


class SeparateNets(nn.Module):
    """A network per task, one after the other; gives what a TaskNet gives.

    Only one network's activations are in memory at once: they are computed again in the backward
    pass, which costs a third more time.

    Args:
        networks: A network of one task each, in the order of the tasks.
        tasks: Tasks, sorted by kind.
    """

    def __init__(self, networks: Sequence[TaskNet], tasks: Sequence[Task]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._parts = [(name, which) for name, _, which in grouped(tasks)]

    def forward(self, x: Tensor) -> Outputs:
        """Outputs by head, each ``(B, outputs)``."""
        outputs = [self._run(network, x) for network in self.networks]
        return {name: torch.cat(outputs[which], 1) for name, which in self._parts}

    def _run(self, network: nn.Module, x: Tensor) -> Tensor:
        def output(x: Tensor) -> Tensor:
            values: tuple[Tensor] = tuple(network(x).values())
            return values[0]

        if not torch.is_grad_enabled():
            return output(x)
        result: Tensor = checkpoint(
            output,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in these networks is random
            context_fn=partial(_contexts, network),
        )
        return result

    def network_gradients(self) -> list[list[Tensor]]:
        """Gradients of each network."""
        return [
            [p.grad for p in network.parameters() if p.grad is not None]
            for network in self.networks
        ]


def _contexts(
    network: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward pass and of its repetition."""
    return nullcontext(), _kept_statistics(network)


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalisation alone: a batch counts once."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def task_net(backbone: Backbone, width: int, tasks: Sequence[Task]) -> TaskNet:
    """A backbone of random (or its loaded) weights with linear heads."""
    return TaskNet(backbone(), width, tasks)


def separate_nets(backbone: Backbone, width: int, tasks: Sequence[Task]) -> SeparateNets:
    """A network per task, each with its own initial weights."""
    return SeparateNets([task_net(backbone, width, [task]) for task in tasks], tasks)


def image_benchmark(
    tasks: Sequence[Task],
    parts: tuple[Part, Part, Part],
    backbone: Backbone,
    width: int,
    *,
    network: str,
    version: dict[str, Any],
    scale: Tensor | None = None,
    extra: dict[str, Callable[[Outputs, Tensor], float]] | None = None,
) -> Benchmark:
    """Put a benchmark of images together.

    Args:
        tasks: Tasks, sorted by kind.
        parts: Training, validation and test part.
        backbone: Makes a new backbone.
        width: Dimensions of its output.
        network: What it is.
        version: What identifies the data besides the sizes of the parts and the source that reads
            them.
        scale: As of :class:`Benchmark`; ``None``: there is no regression.
        extra: As of :class:`Benchmark`.
    """
    train, val, test = parts
    shape = (backbone, width, tasks)
    code = [Path(__file__), *(Path(m.__file__) for m in SOURCES if m.__file__)]
    return Benchmark(
        tasks=tuple(tasks),
        train=train,
        val=val,
        test=test,
        scale=torch.ones(len(tasks)) if scale is None else scale,
        model=partial(task_net, *shape),
        single_task=partial(separate_nets, *shape),
        network=f"{network}, linear heads",
        version={
            **version,
            "parts": [len(train), len(val), len(test)],
            "loader": folder.content_digest(code),
        },
        extra=extra or {},
    )

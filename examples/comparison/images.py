"""What the image benchmarks have in common: their models, and how a benchmark is put together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples import image_models
from examples.comparison.benchmark import Benchmark
from examples.comparison.networks import SeparateNets, TaskNet
from examples.comparison.tasks import Task
from examples.data import folder, images
from examples.training import Part

Backbone = Callable[[], nn.Module]
CODE = (folder, images, image_models, sys.modules[__name__])  # that results of images depend on


class RecomputedNets(SeparateNets):
    """Separate networks of which only one's activations are in memory at once.

    They are computed again in the backward pass, which costs a third more time.
    """

    def output(self, network: nn.Module, x: Any) -> Tensor:
        """As of the base, through a checkpoint in training."""
        if not torch.is_grad_enabled():
            return super().output(network, x)
        result: Tensor = checkpoint(
            super().output,
            network,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in these networks is random
            context_fn=lambda: (nullcontext(), _kept_statistics(network)),
        )
        return result


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch normalisation alone: a batch counts once."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def task_net(backbone: Backbone, *shape: Any) -> TaskNet:
    """A backbone of random (or its loaded) weights with linear heads; see :class:`TaskNet`."""
    return TaskNet(backbone(), *shape)


def separate_nets(
    backbone: Backbone, width: int, tasks: Sequence[Task], *head: Any
) -> RecomputedNets:
    """A network per task, each with its own initial weights."""
    return RecomputedNets([task_net(backbone, width, [t], *head) for t in tasks], tasks)


def image_benchmark(
    tasks: Sequence[Task],
    parts: tuple[Part, Part, Part],
    backbone: Backbone,
    width: int,
    *,
    network: str,
    version: dict[str, Any],
    head: Callable[[int, int], nn.Module] = nn.Linear,
    **own: Any,
) -> Benchmark:
    """Put a benchmark of images together.

    Args:
        tasks: Tasks, sorted by kind.
        parts: Training, validation and test part.
        backbone: Makes a new backbone.
        width: Dimensions of its output.
        network: What it is.
        version: What identifies the data besides the sizes of the parts.
        head: As of :class:`TaskNet`.
        own: Other fields of the :class:`Benchmark`; without a scale no target was divided.
    """
    shape = (backbone, width, tasks, head)
    return Benchmark(
        tuple(tasks),
        *parts,
        model=partial(task_net, *shape),
        single_task=partial(separate_nets, *shape),
        network=f"{network}, linear heads",
        version={**version, "parts": [len(part) for part in parts]},
        **{"scale": torch.ones(len(tasks)), **own},
    )

"""Batches as a reader makes them, and the paper's rule at work on them without a network."""

import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.parallel import Exchange
from bayesagg.reading import Batch, Labels, Part

D = 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(outputs, seed=0, bias=True):
    layer = nn.Linear(D, outputs, bias).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + 10 * seed + i))
    return layer


def labels_of(head, h, seed=0):
    """A head's outputs and labels of its kind, for a mean loss."""
    n = len(h)
    z = head.linear(h).detach()
    factor = torch.full((1, head.num_tasks), 1 / n, dtype=torch.float64)
    if head.kind == "regression":
        return Labels(z, randn(*z.shape, seed=seed), factor, None)
    if head.kind == "binary":
        return Labels(z, (randn(*z.shape, seed=seed) > 0).double(), factor, None)
    y = F.one_hot(randn(*z.shape, seed=seed).argmax(1), z.shape[1]).double()
    return Labels(z[:, None], y[:, None], factor, None)


def part_of(name, head, h, labels, gradient=None):
    if gradient is None:
        gradient = torch.zeros_like(labels.outputs)
    slices = {name: slice(0, head.num_tasks)}
    return Part(head.kind, (name,), (head,), (1,), {}, h, gradient, labels, slices)


def batch_of(heads, seed=0, rows=8, **changes):
    h = randn(rows, D, seed=seed)
    parts = [
        part_of(name, head, h, labels_of(head, h, seed + 50 * i))
        for i, (name, head) in enumerate(heads.items())
    ]
    parts = [changes.get(part.names[0], lambda part: part)(part) for part in parts]
    total = torch.zeros((), dtype=torch.float64)
    kept = [part for part in parts if part is not None]
    return Batch(kept, total, {}, [part.names[0] for part in kept])


def start(rule, heads, steps_per_epoch=None):
    return rule.start(heads, torch.float64, 0, steps_per_epoch)


def plan_of(rule, memory, batch):
    return rule.plan(memory, batch, rule.flags(memory, batch), Exchange(None))


def step(rule, memory, batch):
    plan = plan_of(rule, memory, batch)
    memory.commit(plan.update)
    return plan


def mixed():
    return {
        "reg": RegressionHead(linear(2), noise_variance="learned"),
        "bin": BinaryHead(linear(2, 1)),
        "cls": MulticlassHead(linear(3, 2)),
    }


def absent(part):
    return None

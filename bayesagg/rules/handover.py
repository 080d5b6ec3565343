"""When the warm-up of the default rule ends: not while its heads would be worse than those it has.

With wide features and little evidence a posterior mean can be behind the weights that training has,
above all those of a network that is trained already. So in the last steps before the rule would go
to work, the posterior means *before* a step and the heads themselves are compared on its data.
Where the posterior is behind, linear scalarization goes on for as long again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.heads import Head
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.memory import FadingMemory
from bayesagg.moments import Spectrum
from bayesagg.parallel import Exchange
from bayesagg.reading import Part
from bayesagg.rules.stack import cat
from bayesagg.rules.streaming import Inference

__all__ = ["compared", "is_ready"]

_STEPS = 10  # that are compared before a decision; shorter warm-ups end as they were set
_BEHIND = 0.1  # mean logarithm of the misfits under the posterior over the heads' own
_MOST = math.log(10)  # of a task
_DATA = 12.0  # data for every weight of an output, after which evidence is enough in any case


def is_ready(memory: FadingMemory, warmup: int) -> bool:
    """Whether the rule goes to work in this step; looks at the device where it has to decide."""
    if memory.steps < warmup:
        return False
    if warmup < _STEPS or memory.trial is None:  # or there is no head to set
        return True
    if memory.steps != _decision(memory.steps, warmup):
        return False
    behind, data = (memory.trial / _STEPS).tolist()
    return bool(behind <= _BEHIND or data * memory.steps >= _DATA)


def compared(
    memory: FadingMemory,
    warmup: int,
    heads: Mapping[str, Head],
    here: Mapping[str, Part],
    found: Sequence[Inference],
    exchange: Exchange,
) -> Tensor | None:
    """Sums over the steps before a decision, this one included, ``[2]``; else as they were.

    How far the posterior is behind, a mean over tasks, and data over weights of an output.

    Args:
        memory: before the step.
        warmup: of the rule.
        heads: that the posterior would set.
        here: the part of every head.
        found: posteriors of all stacks.
        exchange: with the other ranks.
    """
    left = _decision(memory.steps + 1, warmup) - memory.steps
    if warmup < _STEPS or left > _STEPS or not heads:
        return memory.trial
    columns = []
    for one in found:
        means = one.frame.by_head(_before(one), False)
        columns += [_columns(heads[n], n, here[n], m) for n, m in means.items() if n in heads]
    if not columns:
        return memory.trial
    posterior, own, count, data = exchange.sum([torch.cat(columns, 1)])[0]
    known = count > 0
    # One task that is fitted exactly, or not at all, does not decide for the others.
    ratio = torch.where(known, posterior / own, 1.0).nan_to_num(1.0).log().clamp(-_MOST, _MOST)
    number = known.sum().clamp_min(1)
    new: Tensor = torch.stack([ratio.sum(), data.sum()]) / number
    return new if left == _STEPS or memory.trial is None else memory.trial + new


def _before(found: Inference) -> Tensor:
    """Posterior means before the step, ``[G, P, D]``; of many weights by the basis of now."""
    units, now = found.stack.units, found.posterior
    gram, shift = map(cat, zip(*[(u.gram, u.shift) for u in units], strict=True))
    if found.bases[0] is None:
        return Spectrum.of(gram, shift, found.ridge).mean
    return Spectrum.near(gram, shift, found.ridge, now.vectors, now.values, now.mean).mean


def _columns(head: Head, name: str, part: Part, mean: Tensor) -> Tensor:
    """Of every task of a head: both misfits, labels, and labels over weights, ``[4, K]``."""
    assert part.labels is not None
    columns, bound = part.slices[name], BOUNDS[head.kind]
    own = part.labels.columns(columns.start, columns.stop).to(mean.dtype)
    h = part.features.to(mean.dtype)
    outputs = (F.pad(h, (0, 1), value=1.0) if head.has_bias else h) @ mean.mT
    misfits = [bound.misfit(x) for x in (replace(own, outputs=outputs.view_as(own.outputs)), own)]
    if own.present is not None:
        misfits = [misfit * own.present for misfit in misfits]
    count = own.count()
    return torch.stack([*[misfit.sum(0) for misfit in misfits], count, count / mean.shape[1]])


def _decision(steps: int, warmup: int) -> int:
    """The first step, not before ``steps``, that is a power of two of the warm-up."""
    while warmup < steps:
        warmup *= 2
    return warmup

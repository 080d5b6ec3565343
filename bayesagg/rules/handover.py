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

__all__ = ["compared", "next_due"]

_STEPS = 10  # that are compared before a decision; shorter warm-ups end as they were set
_BEHIND = 0.1  # mean logarithm of the misfits under the posterior over the heads' own
_MOST = math.log(10)  # of a task
_DATA = 12.0  # data for every weight of an output, after which evidence is enough in any case


def next_due(memory: FadingMemory) -> int | None:
    """When the warm-up may end, as of this step; ``None``: it is over, and the rule at work.

    Looks at the device in a step that has to decide.
    """
    due = memory.due
    if due is None or memory.steps < due:
        return due
    if memory.trial is None:  # nothing was compared
        return None
    behind, data, steps = memory.trial.tolist()
    if behind <= _BEHIND * steps or data * memory.steps >= _DATA * steps:
        return None
    while due <= memory.steps:
        due = 2 * due or 1  # 0 of a checkpoint that nobody saved would stay
    return due


def compared(
    memory: FadingMemory,
    due: int,
    heads: Mapping[str, Head],
    here: Mapping[str, Part],
    found: Sequence[Inference],
    exchange: Exchange,
) -> Tensor | None:
    """What a decision goes by, this step included: sums over steps, ``[3]``; ``None``: not yet.

    Of ``Σ_i log(ℓ'_i / ℓ_i) / K``, how far the posterior is behind (docs/theory.md), of data over
    weights of an output, and of one.

    Args:
        memory: before the step.
        due: of :func:`next_due`.
        heads: that the posterior would set.
        here: the part of every head.
        found: posteriors of all stacks.
        exchange: with the other ranks.
    """
    if due < _STEPS or due - memory.steps > _STEPS:
        return None
    earlier = memory.trial if due == memory.due else None
    columns = []
    for one in found:
        means = one.frame.by_head(_before(one), False)
        columns += [_columns(heads[n], n, here[n], m) for n, m in means.items() if n in heads]
    if not columns:
        return earlier
    posterior, own, count, data = exchange.sum([torch.cat(columns, 1)])[0]
    known = count > 0
    # One task that is fitted exactly, or not at all, does not decide for the others.
    ratio = torch.where(known, posterior / own, 1.0).nan_to_num(1.0).log().clamp(-_MOST, _MOST)
    sums = torch.stack([ratio.sum(), data.sum()]) / known.sum().clamp_min(1)
    new = torch.cat([sums, sums.new_ones(1)])
    return new if earlier is None else earlier + new


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

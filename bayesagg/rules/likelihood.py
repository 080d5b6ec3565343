"""The default rule: every task's gradient in nats, by posteriors that follow the network.

See docs/theory.md for the derivation. One step, for the heads that read one tensor:

1. ``Λ ← exp(-n/N) Λ + H̃ᵀH̃`` and ``η_k ← exp(-n/N) η_k + H̃ᵀt_k``: evidence that fades by the datum,
   and has none twice.
2. ``m_k = (Λ + λ_k)⁻¹ η_k`` with the ridge ``λ_k = τ_k² / γ ȳ_k²`` of the prior ``N(0, γ ȳ_k²)``,
   in units of the labels (``1 / c γ`` for a classification of curvature bound c): the head once
   the backward pass is over.
3. Regressions: gradient of a Student-t likelihood under the posterior without the datum, with a
   scale τ² that lags. Others: their own gradient in units of the running mean of their loss.
4. The length of the sum is kept near that of the plain gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress
from typing import ClassVar

import torch
from torch import Tensor

from bayesagg.heads import Head, check_kinds
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.memory import FadingMemory, Update
from bayesagg.parallel import Exchange
from bayesagg.predicting.state import Inferred
from bayesagg.reading import Batch, Part
from bayesagg.rules.arrange import arrange
from bayesagg.rules.base import Plan, Rule, Tasks, uniform_weights
from bayesagg.rules.gradients import Exact, exact_gradients, gradients, squared_lengths, totals
from bayesagg.rules.handover import compared, next_due
from bayesagg.rules.inferred import of_fading
from bayesagg.rules.others import others_of
from bayesagg.rules.settings import Settings
from bayesagg.rules.stack import make_stacks
from bayesagg.rules.streaming import Inference, infer
from bayesagg.rules.warmup import in_units, inverse_levels
from bayesagg.units import Frame, decays

__all__ = ["LikelihoodRule"]

_INVARIANT, _OTHER = 5.0, 1.0  # how far the aggregate's length may be from the plain gradient's


@dataclass(frozen=True)
class LikelihoodRule(Settings, Rule):
    """Settings of the default rule; an ablation is ``dataclasses.replace(rule, …)``.

    Args:
        memory: N, data after which evidence has faded to 1/e; ``None``: twenty times the number
            of weights of an output, but no more than there are data, as far as labels tell.
        warmup: steps of linear scalarization first, while evidence gathers; more, as long as heads
            that are trained already are better than it would make them (at most until there are
            twelve data for each of their weights; not with less than ten steps). For the features,
            losses count in units of their labels where the mean square of any is above 4.
        lag: steps that the running means of the scales go back; ``None``: half of those so far, at
            least 200, for what tasks are weighed by, and 100 for noise and lengths.
        prior_variance: γ of the prior over the weights of every output, ``N(0, γ I)``, for
            regressions in units of the mean square of their labels; ``None``: 0.05, and 3.25 over
            the number of weights of an output where that is less; of regressions with fewer than
            20 data a weight, as counted, smaller in proportion; of features whose mean square is
            below 0.1 larger in proportion; of C > 16 classes C / 16 times that. Of a head that
            sets its own, that.
        degrees_of_freedom: ν of the Student-t likelihood of regressions.
        keep_length: keep the length of the aggregate within a factor of the running length of the
            plain gradient: 5 under an optimizer whose step does not depend on the scale of the
            gradient (Adam without much weight decay in it), else 1. ``False``: as it comes.
            Without any head, of the sum of the weighed losses to that of the losses.

    Raises:
        ValueError: for a setting out of range.
    """

    name: ClassVar[str] = "likelihood"

    def inferred(self, memory: FadingMemory) -> dict[str, Inferred]:
        """Posteriors of all heads of which there is evidence, for predictions."""
        return of_fading(self, memory)

    def start(
        self, tasks: Tasks, dtype: torch.dtype, seed: int, steps_per_epoch: int | None
    ) -> FadingMemory:
        """A memory without evidence; warns of settings that this rule does not use.

        Raises:
            HeadError: for a kind of head without a bound.
        """
        if steps_per_epoch is not None:
            warnings.warn(
                "steps_per_epoch has no effect under the default rule, which knows of no epochs: "
                "leave it out. rule='paper' uses it.",
                stacklevel=4,
            )
        for name, head in tasks.items():
            if isinstance(head, Head):
                _warn_of_unused(name, head)
        memory = FadingMemory(tasks, dtype, counting=self.memory is None)
        memory.due = self.warmup
        check_kinds(memory.heads, BOUNDS, "likelihoods.bounds.BOUNDS")
        return memory

    def spared(self, memory: FadingMemory) -> tuple[str, ...]:
        """Heads of which there is evidence, once the rule is at work."""
        if memory.due is not None:
            return ()
        return tuple(self._free({n: memory.heads[n] for u in memory.units for n in u.names}))

    def _free(self, heads: Mapping[str, Head]) -> dict[str, Head]:
        """Those whose weights the posterior may set."""
        return {name: h for name, h in heads.items() if h.writable and self.sets(h)}

    def flags(self, memory: FadingMemory, batch: Batch) -> list[bool]:
        """Of every head: whether it takes part, cannot share Gram matrices, is not inferred."""
        here = {}
        for part in batch.parts:
            labels = part.labels
            alone = labels is not None and (
                labels.present is not None or labels.factor.shape[0] > 1
            )
            for name, head in zip(part.names, part.heads, strict=True):
                here[name] = True, alone, labels is None or not head.writable
        return [*chain.from_iterable([here.get(n, (False, True, False)) for n in memory.heads])]

    @torch.no_grad()
    def plan(
        self, memory: FadingMemory, batch: Batch, flags: list[bool], exchange: Exchange
    ) -> Plan:
        """Gradients at every head's features, weights, and what the step adds to the memory."""
        present, alone, owning = [{*compress(memory.heads, flags[i::3])} for i in range(3)]
        parts = {name: part for part in batch.parts for name in part.names}
        like = memory.zero(batch.total.device)
        here = {
            name: parts[name] if name in parts else Part.blank(name, memory.heads[name], like)
            for name in memory.heads
            if name in present and name not in owning
        }
        active, idle = arrange(memory.units, memory.heads, here, alone, memory.counting, like)
        due = next_due(memory)
        stacks = make_stacks(active, here, memory.dtype)
        found = infer(self, memory, stacks, exchange, due is None)
        exact = [exact_gradients(self, part) for part in found]
        others = others_of(memory, batch, owning, like, exchange)
        own = {} if others is None else others.ratios(memory)
        values = [self._ratios(one, said) for one, said in zip(found, exact, strict=True)]
        ratios = dict(own)
        for one, value in zip(found, values, strict=True):
            if one.stack.exact < value.shape[1]:
                ratios |= one.frame.by_head(value, True)
        # Of all heads on every rank: weights that are sharded are gathered.
        weights = {n: h.weights() for n, h in memory.heads.items() if n in present}
        planned, plain = gradients(batch.parts, here, exact, ratios, weights)
        lengths = squared_lengths(planned, plain, like)
        if others is not None and not memory.heads:
            lengths = others.squared_sums(others.ratio)
        squares, lengths, sums = totals(exact, lengths, others, exchange)
        recent, long = self.decays_of(memory.steps)
        length = _moved(memory.length, lengths, recent)
        decay = decays(recent, long, like)
        units = [u for one, s in zip(found, squares, strict=True) for u in one.units(s, decay)]
        before = [pair for one in found for pair in zip(one.stack.units, one.fades(), strict=True)]
        scales = {} if others is None else others.scales(sums[0], long)
        update = Update(idle + units, scales, length, memory.steps, before, decay)
        update.due = due
        plan = Plan(update=update)
        beside = [name for name in own if name in batch.losses and name not in memory.heads]
        if due is not None:
            free = self._free(memory.heads)
            update.trial = compared(memory, due, free, here, found, exchange)
            plan.weights = uniform_weights(memory.tasks, like)
            if inverse := inverse_levels(units, memory.heads, own):
                losses = None if memory.heads else others
                planned, lengths = in_units(batch, inverse, weights, losses, exchange)
                scale = self._length_scale(memory, lengths)
                plan.gradients = {key: gradient * scale for key, gradient in planned.items()}
                # Of heads whose labels are large it is large: not for what lies beside them.
                factor = scale.clamp_max(1.0) if memory.heads else scale
                plan.loss_weights = {name: inverse[name].squeeze() * factor for name in beside}
                weighed = {n: x * (factor if n in beside else scale) for n, x in inverse.items()}
                plan.weights = partial(_shares, [*parts, *beside], [], [], weighed)
            return plan
        frames = [one.frame for one in found]
        plan.weights = partial(_shares, [*parts, *beside], frames, values, own)
        scale = self._length_scale(memory, length)
        plan.gradients = {key: gradient * scale for key, gradient in planned.items()}
        plan.loss_weights = {name: own[name].squeeze() * scale for name in beside}
        for one in found:
            plan.heads |= one.module_weights(memory.heads)
        plan.spared = tuple(plan.heads)
        return plan

    def _ratios(self, found: Inference, exact: Exact) -> Tensor:
        """What the losses of a stack's tasks are multiplied by on average, ``[G, T]``."""
        r = found.stack.exact
        if r == found.current.shape[1]:
            return exact.ratio
        inverse = found.current[:, r:].clamp_min(found.frame.least_scale).reciprocal_()
        if found.stack.weights is not None:  # a task without a label in this batch has none
            inverse = inverse * (found.stack.weights.sum((1, 2)) > 0)[:, None]
        return torch.cat([exact.ratio, inverse], 1) if r else inverse

    def _length_scale(self, memory: FadingMemory, length: Tensor) -> Tensor:
        """What the aggregate is multiplied by."""
        if not self.keep_length:
            return torch.ones_like(length[0])
        ours, plain = length.unbind()
        square = ours / plain
        within = (_INVARIANT if memory.invariant else _OTHER) ** 2
        # No gradient at all: 0 / 0.
        return (square.clamp(1 / within, within) / square).sqrt_().nan_to_num_(1.0, 1.0, 1.0)


def _warn_of_unused(name: str, head: Head) -> None:
    """Say which settings of a head this rule does not use."""
    settings = ("s", "moments", "num_samples")
    unused = [key for key in settings if getattr(head, key, None) not in (None, 0)]
    if unused:
        verb, them = ("has", "it") if len(unused) == 1 else ("have", "them")
        warnings.warn(
            f"task {name!r}: {' and '.join(unused)} {verb} no effect under the default rule: leave "
            f"{them} out, or use rule='paper'.",
            stacklevel=6,
        )


def _moved(state: Tensor | None, value: Tensor, decay: float) -> Tensor:
    """A running sum whose normalisation cancels from ratios."""
    return value * (1 - decay) if state is None else torch.lerp(value, state, decay)


def _shares(
    names: Sequence[str],
    frames: Sequence[Frame],
    values: Sequence[Tensor],
    others: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Ratios of the tasks of this rank's batch as shares of their sum; 0 without any label.

    Args:
        names: of the tasks in the batch.
        frames: of the stacks.
        values: ratios by stack, ``[G, T]``.
        others: ratios by task that is in no stack, ``[o]``.
    """
    found = dict(others)
    for frame, value in zip(frames, values, strict=True):
        found |= frame.by_head(value, True)
    here = {name: found[name] for name in names if name in found}
    if not here:
        return {}
    together = torch.cat(list(here.values()))
    shares = together / together.sum().clamp_min(torch.finfo(together.dtype).tiny)
    sizes = [len(value) for value in here.values()]
    return dict(zip(here, shares.split(sizes), strict=True))

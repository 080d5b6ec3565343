"""The arithmetic of the default rule: evidence, posteriors and gradients of stacked units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.heads import Head, stacked
from bayesagg.likelihoods.bounds import floored
from bayesagg.memory import FadingMemory
from bayesagg.moments import Spectrum
from bayesagg.parallel import Exchange
from bayesagg.predicting.regression import share_of_small
from bayesagg.repeats import Repeats
from bayesagg.rules.arrange import frame_of
from bayesagg.rules.evidence import Evidence, evidence_of
from bayesagg.rules.settings import Settings
from bayesagg.rules.stack import Stack, cat
from bayesagg.units import Basis, Frame, Unit, running_mean

__all__ = [
    "Inference",
    "infer",
    "of_features",
    "scales_and_ridges",
]

_LARGE = 128  # weights of an output above which a decomposition serves for several steps
_TURNOVER = 0.25  # until this share of the evidence is new


@dataclass
class Inference:
    """Posteriors of a stack, the evidence of the step among theirs.

    Attributes:
        stack: whose heads these are.
        frame: of the stack.
        gram: ``[G, D, D]``, after the step; shift too.
        shift: ``[G, P, D]``.
        seen: data of the step, ``[G]``, or their number where no label is missing.
        misfit: its mean at the outputs, ``[G, T]``, or of the tasks that are not exact.
        scale: running means before the step, ``[G, 5, T]``.
        current: the scale that every task is weighed by in this step, ``[G, T]``.
        ridge: of all columns, ``[G, P]``, or ``[G, 1]``.
        posterior: of all columns.
        bases: of the units, where they are kept.
        repeats: of the units.
        fade: what the evidence before was multiplied by, ``[G, 1]`` or a number.
    """

    stack: Stack
    frame: Frame
    gram: Tensor
    shift: Tensor
    seen: Tensor | float
    misfit: Tensor
    scale: Tensor
    current: Tensor
    ridge: Tensor
    posterior: Spectrum
    bases: list[Basis | None]
    repeats: Sequence[Repeats | None]
    fade: Tensor | float

    def fades(self) -> Sequence[Tensor | float]:
        """The fade of every unit."""
        if isinstance(self.fade, float):
            return [self.fade] * len(self.stack.units)
        return _split(self.fade, self.stack.sizes)

    def units(self, sums: Tensor, decay: Tensor) -> list[Unit]:
        """Units with the evidence of the step.

        Args:
            sums: of squared leave-one-out residuals of every exact task and of its squared
                labels, ``[2, G, R]``.
            decay: of the running means, ``[5, 1]``.
        """
        seen, r = self.seen, self.stack.exact
        count = _at_least_one(seen) if isinstance(seen, Tensor) else seen
        values, levels = (sums / count).unbind()
        if r < self.current.shape[1]:
            others = self.misfit[:, self.misfit.shape[1] - self.current.shape[1] + r :]
            values = torch.cat([values, others], 1)
            levels = torch.cat([levels, torch.ones_like(others)], 1)
        known = seen > 0 if isinstance(seen, Tensor) else None
        values, one = floored(values, levels), torch.ones_like(values)
        scale = running_mean(self.scale, (values, levels, one, values, one), known, decay)
        sizes = self.stack.sizes
        state = (_split(t, sizes) for t in (self.gram, self.shift, scale))
        parts = zip(self.stack.units, *state, self.bases, self.repeats, strict=True)
        return [
            Unit(unit.names, unit.wide, unit.weighted, not unit.weighted, *own)
            for unit, *own in parts
        ]

    def module_weights(self, heads: Mapping[str, Head]) -> dict[str, Tensor]:
        """Posterior mean of every head, ``[o, D]``; its own weights without a label in the step.

        Heads that keep their own gradient are left out.
        """
        found = self.frame.by_head(self.posterior.mean, False)
        for name in [name for name in found if heads[name].readout == "gradient"]:
            del found[name]
        if self.stack.units[0].weighted:
            evidence = torch.as_tensor(self.seen) > 0
            shape = self.posterior.mean.shape[:2]
            known = self.frame.by_head(evidence[:, None].expand(shape), False)
            for name, mean in found.items():
                own = stacked(heads[name]).to(mean.dtype)
                found[name] = torch.where(known[name][:, None], mean, own)
        return found


def infer(
    rule: Settings,
    memory: FadingMemory,
    stacks: Sequence[Stack],
    exchange: Exchange,
    working: bool,
) -> list[Inference]:
    """Posteriors of all stacks from the memory and the evidence of all ranks' batches.

    ``working``: the warm-up is over.
    """
    found = [evidence_of(stack, memory.dtype, exchange) for stack in stacks]
    if exchange.ranks is not None:
        sums = iter(exchange.sum([part for one in found for part in one.over()]))
        found = [one.replaced(sums) for one in found]
    pairs = zip(stacks, found, strict=True)
    return [_posterior(rule, memory, stack, new, working) for stack, new in pairs]


def _fade(seen: Tensor | float, lengths: Sequence[float], like: Tensor) -> Tensor | float:
    """What the evidence before is multiplied by, ``[G, 1]`` or a number."""
    one = len(set(lengths)) == 1
    if one and isinstance(seen, float):
        return math.exp(-seen / lengths[0])
    length = lengths[0] if one else like.new_tensor(lengths)
    return torch.exp(torch.as_tensor(-seen / length))[:, None]


def _posterior(
    rule: Settings, memory: FadingMemory, stack: Stack, new: Evidence, working: bool
) -> Inference:
    units, seen, exact = stack.units, new.seen, stack.exact
    frame = frame_of(rule, memory, units, exact, new.shift[..., 0])
    before = [*map(cat, zip(*[(u.gram, u.shift, u.scale) for u in units], strict=True))]
    misfit, length = new.misfit, rule.memory_of(new.gram.shape[-1])
    repeats, lengths = [unit.repeats for unit in units], [length]
    if new.marks is not None and stack.repeats is not None:
        counted = stack.repeats.after(new.marks, seen, length)
        repeats, lengths = [*counted.split(stack.sizes)], counted.lengths(length)
        frame = frame.of_few(lengths, length)
    fade = _fade(seen, lengths, new.gram)
    if isinstance(fade, Tensor):
        gram = torch.addcmul(new.gram, before[0], fade[..., None])
        shift = torch.addcmul(new.shift, before[1], fade[..., None])
    else:
        gram = new.gram.add_(before[0], alpha=fade)
        shift = new.shift.add_(before[1], alpha=fade)
    if misfit.shape[1]:
        misfit = misfit / (_at_least_one(seen) if isinstance(seen, Tensor) else seen)
    levels = misfit
    if not units[0].started:
        misfit, levels = misfit.tensor_split([before[2].shape[2]], 1)
    current, ridge = scales_and_ridges(frame, exact, units[0].started, before[2], misfit, levels)
    if working:
        ridge = of_features(ridge, frame.small, gram, stack.bias, lengths)
    posterior, bases = _spectrum(stack, before[0], gram, shift, ridge, new.squares, fade, length)
    state = (gram, shift, seen, misfit, before[2], current, ridge)
    return Inference(stack, frame, *state, posterior, bases, repeats, fade)


def scales_and_ridges(
    frame: Frame, exact: int, started: bool, scale: Tensor, misfit: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Scales that tasks are weighed by, ``[G, T]``, and ridges of all columns, ``[G, P]``.

    The prior variance of a regression is ``γ`` times the level of its labels, so that their unit
    has no say; the ridge is the noise over it.

    Args:
        frame: of the units.
        exact: number R of regressions among the tasks, which come first.
        started: every task has a running mean.
        scale: the running means, ``[G, 5, T]``.
        misfit: the scale of a task without one, ``[G, T]``.
        levels: the level of a regression without one, ``[G, R]``.
    """
    r = exact
    total, level, weight, long, count = scale.unbind(1)
    current, most = long / count, math.inf
    if not started:
        known, first = weight > 0, torch.ones_like(misfit[:, r:])  # 1: they have no unit
        current = torch.where(known, current, misfit)
        total = torch.where(known, total / weight, misfit)
        level = torch.where(known, level / weight, torch.cat([levels, first], 1))
        most = math.sqrt(torch.finfo(level.dtype).max)
    relative = (total / level).nan_to_num_(1.0, most)  # all labels so far were zero
    noise, ridge = frame.noise, frame.ridge
    if noise is not None:
        known, own = noise > 0, noise / (level / weight if started else level)[:, :r]
        own = torch.where(known, own.nan_to_num_(1.0, most), relative[:, :r])
        relative = cat([own, relative[:, r:]], 1)
        current = cat([torch.where(known, noise, current[:, :r]), current[:, r:]], 1)
    if r == ridge.shape[1]:
        return current, relative * ridge
    return current, torch.cat([relative[:, :r] * ridge[:, :r], ridge[:, r:]], 1) if r else ridge


def of_features(
    ridge: Tensor, small: Tensor, gram: Tensor, bias: bool, data: Sequence[float]
) -> Tensor:
    """Ridges times ``q / small`` where the sum q of a datum's squared features is less than that.

    ``N(0, γ I)`` expects outputs of the size of the features: of unit vectors in many dimensions
    nearly none. Not in the warm-up, at whose start features of most networks are small, and grow.

    Args:
        ridge: λ, ``[G, P]`` or ``[G, 1]``.
        small: in the same shape; 0: never.
        gram: ``Λ``, ``[G, D, D]``.
        bias: the last feature is a constant, whose sum of squares is the number of data.
        data: without it, that of a full memory, by Gram matrix or for all.
    """
    squares = gram.diagonal(dim1=1, dim2=2)
    count: Tensor | float = data[0]
    if bias:
        squares, count = squares.split_with_sizes([squares.shape[1] - 1, 1], 1)
    elif len(set(data)) > 1:
        count = squares.new_tensor(data)[:, None]
    return ridge * share_of_small(squares, count, small)


def _spectrum(
    stack: Stack,
    before: Tensor,
    gram: Tensor,
    shift: Tensor,
    ridge: Tensor,
    squares: Tensor | None,
    fade: Tensor | float,
    length: float,
) -> tuple[Spectrum, list[Basis | None]]:
    """Posteriors, and the basis that is kept for the next step, by unit.

    A step replaces the share ``n/N`` of the evidence. Until a quarter of it is new, a decomposition
    serves on: its diagonal is kept exact, and the means come from conjugate gradients, to about
    0.3 % (tests/rules/test_kept_basis.py).
    """
    if gram.shape[-1] <= _LARGE:
        return Spectrum.of(gram, shift, ridge), [None] * len(stack.units)
    vectors = stack.kept_vectors(gram.dtype)
    if vectors is None or squares is None:
        posterior = Spectrum.of(gram, shift, ridge)
        left = _interval(before, gram, fade, length)
    else:
        old = cat([unit.basis.values for unit in stack.units if unit.basis is not None])
        values = torch.addcmul(squares, old, torch.as_tensor(fade, dtype=old.dtype))
        start = cat([unit.basis.mean for unit in stack.units if unit.basis is not None])
        posterior = Spectrum.near(gram, shift, ridge, vectors, values, start)
        left = min(unit.basis.left for unit in stack.units if unit.basis is not None) - 1
    vectors = posterior.vectors.to(stack.precision(gram.dtype))
    parts = (vectors, posterior.values.clamp(min=0), posterior.mean)
    pieces = zip(*(_split(part, stack.sizes) for part in parts), strict=True)
    return posterior, [Basis(q, diagonal, mean, left) for q, diagonal, mean in pieces]


def _interval(before: Tensor, gram: Tensor, fade: Tensor | float, length: float) -> int:
    """Steps like this one until a share of the evidence is new; looks at the device.

    At the start, when there is little evidence, few; with a full memory ``_TURNOVER · N / n``.
    """
    old, now = (part.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) for part in (before, gram))
    share = float((1 - fade * old / now).nan_to_num(1.0).max())
    return int(_TURNOVER * min(1 / max(share, 1e-9), length))


def _at_least_one(seen: Tensor) -> Tensor:
    return seen.clamp(min=1.0)[:, None]


def _split(values: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [values] if len(sizes) == 1 else values.split(sizes)

"""The step in which nothing is new: labels from first derivatives, all checks in one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from operator import is_

import torch
from torch import Tensor

from bayesagg.reading.given import fit_constant, fit_partial
from bayesagg.reading.known import Known
from bayesagg.reading.observed import Read
from bayesagg.reading.step import Features, Group

__all__ = ["Factors", "look", "read_group"]

_MANY = 256  # sets of heads that take part in a step together


class Factors:
    """Factors of losses that were verified, kept on the device."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], tuple[list[Known | None], int, Tensor | None]] = {}

    def of(self, group: Group) -> Tensor | None:
        """Of every column for this number of data, ``[1, K]``; ``None``: not known."""
        like, known = group.observed.output, group.known
        rows = like.shape[-2]
        before, data, factor = self._kept.get(group.names, (None, 0, None))
        same = data == rows and before is not None and all(map(is_, before, known))
        if same and (factor is None or (factor.device, factor.dtype) == (like.device, like.dtype)):
            return factor
        values = [f for one in known if one is not None for f in one.factors(rows)]
        factor = like.new_tensor(values)[None] if len(values) == like.shape[-1] else None
        if len(self._kept) >= _MANY:
            self._kept.clear()
        self._kept[group.names] = known, rows, factor
        return factor


def read_group(group: Group, factors: Factors) -> None:
    """Labels of a group whose losses were all verified before; else nothing.

    Args:
        group: whose ``read`` is set.
        factors: of losses.
    """
    if group.own:
        return
    for said, known in zip(group.saids, group.known, strict=True):
        if known is None or known.own or said.form not in known.forms:
            return
    first, given = group.known[0], group.usable is not None
    assert first is not None
    if given and group.partial:
        group.read = fit_partial(group.likelihood, group.observed, first.weighted)
        return
    if first.weighted:
        return
    any_factor = not (given or group.likelihood.needs_factor)
    factor = None if any_factor and first.masked else factors.of(group)
    if given and factor is not None:
        group.read = fit_constant(group.likelihood, group.observed, factor)
    elif first.by_label and factor is not None:
        group.read = _read_partial(group, factor, first.by_label)
    elif not given and (factor is not None or any_factor):
        group.read = group.likelihood.read(group.observed, factor)


def _read_partial(group: Group, factor: Tensor, over: tuple[str, ...]) -> Read:
    """Labels, some of which may be missing, of losses over those that are not.

    Args:
        group: to be read.
        factor: if none were missing, ``[1, K]``.
        over: of which labels the factor may be a number; if that is not clear, those of every
            column of a head must be as many.
    """
    observed = group.observed
    present = observed.gradient != 0
    own = present.sum(0, dtype=factor.dtype)
    count = own if over == ("columns",) else observed.mean_of_head(own)
    share = count.clamp(min=1) / len(present)
    read = group.likelihood.read(observed, factor / share, present)
    # Labels that are all equal to the outputs have no derivative either: second ones tell.
    checks = [*read.checks, count > 0]
    if len(over) > 1:
        checks.append(own == count)
    return replace(read, checks=tuple(checks))


def look(groups: Sequence[Group], features: Features, total: Tensor) -> bool:
    """Look at the device, once: which heads are read, and whether all is finite and valid.

    Args:
        groups: whose ``read`` is taken away if it does not hold for some head.
        features: that the heads read.
        total: sum of the losses.
    """
    sums = torch.cat([part.view(1) for part in (total, *features.sums())])
    flags = [_finite(sums)]
    for group in groups:
        flags += _flags(group)
    values, sizes = torch.cat(flags).tolist(), [flag.numel() for flag in flags]
    fine, stop = all(values[: sizes[0]]), sizes[0]
    sizes_left = iter(sizes[1:])
    for group in groups:
        if group.usable is not None:
            start, stop = stop, stop + next(sizes_left)
            fine &= all(values[start:stop])
        read = group.read
        checks = 1 if read is None else len(read.checks)
        start, stop = stop, stop + sum(islice(sizes_left, checks))
        valid = all(values[start:stop])
        fine &= valid
        if read is None:
            continue
        group.complete = [True] * len(group.saids)
        if read.present is not None:
            start, stop = stop, stop + next(sizes_left)
            group.complete = values[start:stop]
        if not valid:
            group.read = None
    return fine


def _finite(numbers: Tensor) -> Tensor:
    """As ``isfinite``, in two operations."""
    return (numbers - numbers).logical_not()


def _flags(group: Group) -> list[Tensor]:
    flags = [] if group.usable is None else [group.usable.view(-1)]
    observed, read = group.observed, group.read
    if read is None:
        return [*flags, _finite(observed.gradient.sum()).view(1)]
    flags += read.checks
    if read.present is not None:
        flags.append(observed.all_of_head(read.present.all(0)))
    return flags

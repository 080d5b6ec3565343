"""The step in which nothing is new: labels from first derivatives, all checks in one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesagg.reading.given import fit_constant, fit_partial
from bayesagg.reading.known import Known
from bayesagg.reading.step import Features, Group

__all__ = ["Factors", "look", "read_group"]

_MANY = 256  # sets of heads that take part in a step together


class Factors:
    """Factors of losses that were verified, kept on the device."""

    def __init__(self) -> None:
        self._base: dict[tuple[str, ...], tuple[list[Known], Tensor]] = {}

    def of(self, group: Group) -> Tensor | None:
        """Of every column for this number of data, ``[1, K]``; ``None``: not known."""
        known = [one for one in group.known if one is not None]
        like = group.observed.output
        rows = like.shape[-2]
        ratios = [ratio for one in known if (ratio := one.ratio(rows)) is not None]
        if len(ratios) < len(group.known):
            return None
        if len(set(ratios)) > 1:  # rare: some losses are means, others sums
            pairs = zip(known, ratios, strict=True)
            return like.new_tensor([f * ratio for one, ratio in pairs for f in one.factor])[None]
        names = tuple(said.name for said in group.saids)
        kept = self._base.get(names)
        if (
            kept is None
            or kept[1].device != like.device
            or kept[1].dtype != like.dtype
            or any(a is not b for a, b in zip(kept[0], known, strict=True))
        ):
            if len(self._base) >= _MANY:
                self._base.clear()
            base = like.new_tensor([f for one in known for f in one.factor])[None]
            kept = self._base[names] = known, base
        return kept[1] if ratios[0] == 1 else kept[1] * ratios[0]


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
    elif not given and (factor is not None or any_factor):
        group.read = group.likelihood.read(group.observed, factor)


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
    values = iter(torch.cat(flags).tolist())
    fine = all([next(values) for flag in flags[:1] for _ in range(len(flag))])
    for group in groups:
        if group.usable is not None:
            fine &= all([next(values) for _ in range(group.usable.numel())])
        if group.read is None:
            fine &= next(values)
            continue
        valid = all([next(values) for check in group.read.checks for _ in range(len(check))])
        complete = group.read.present is None
        group.complete = [True if complete else next(values) for _ in group.saids]
        if not valid:
            group.read, fine = None, False
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

"""The first steps of the default rule: linear scalarization, in units of labels that are large.

A network that was just initialised says numbers of about one. Where the labels of a task are
hundreds, nearly all of the plain gradient at the features is that task's, and asks for features
that are hundreds of times as long: some steps of Adam that way harm all tasks
(docs/when-to-use.md, "Units of the labels").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesagg.heads import Head
from bayesagg.parallel import Exchange
from bayesagg.reading import Batch
from bayesagg.rules.base import Key
from bayesagg.rules.gradients import gradients, squared_lengths
from bayesagg.units import Unit

__all__ = ["in_units", "inverse_levels"]

_LARGE = 4.0  # mean squared labels above which their unit is noticed; docs/when-to-use.md


def inverse_levels(units: Sequence[Unit], heads: Mapping[str, Head]) -> dict[str, Tensor]:
    """``1 / max(1, ȳ²)`` of every task with evidence, ``[K]``; nothing where no ``ȳ²`` is large.

    Looks at the device. ``ȳ²`` is the running mean square of labels, 1 where they have no unit.
    """
    found: dict[str, Tensor] = {}
    for unit in units:
        level, weight = unit.scale[:, 1], unit.scale[:, 2]
        levels = torch.where(weight > 0, level / weight, 1.0).flatten()
        sizes = [heads[name].num_tasks for name in unit.names]
        found.update(zip(unit.names, levels.clamp_min(1.0).split(sizes), strict=True))
    if not found or float(torch.cat(list(found.values())).max()) <= _LARGE:
        return {}
    return {name: level.reciprocal() for name, level in found.items()}


def in_units(
    batch: Batch,
    inverse: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    exchange: Exchange,
) -> tuple[dict[Key, Tensor], dict[str, Tensor], Tensor]:
    """Gradient of ``Σ_k ℓ_k / max(1, ȳ_k²)`` at the features.

    Args:
        batch: of this step.
        inverse: of :func:`inverse_levels`; tasks that are not named count as they are.
        weights: of all heads, ``[o, D]``.
        exchange: with the other ranks.

    Returns:
        gradients by key, ``[N, d]``; by task what its loss is multiplied by, ``[K]``; squared
        lengths of these gradients and of the plain ones, ``[2]``.
    """
    like = next(iter(inverse.values())).new_zeros(())
    factors = {
        name: inverse[name] if name in inverse else like.new_ones(head.num_tasks)
        for part in batch.parts
        for name, head in zip(part.names, part.heads, strict=True)
    }
    planned, plain = gradients(batch.parts, {}, [], factors, weights)
    return planned, factors, exchange.sum([squared_lengths(planned, plain, like)])[0]

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
from bayesagg.rules.others import Others
from bayesagg.units import Unit

__all__ = ["in_units", "inverse_levels"]

_LARGE = 4.0  # mean squared labels above which their unit counts; docs/theory.md


def inverse_levels(
    units: Sequence[Unit], heads: Mapping[str, Head], ratios: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``1 / max(1, ȳ²)`` of every task, ``[K]``; nothing where no ``ȳ²`` is large.

    Looks at the device. ``ȳ²`` is the running mean square of labels, 1 where they have no unit;
    where there is no inference, the running mean of the loss in its place.

    Args:
        units: with evidence, the step's included.
        heads: by name.
        ratios: of tasks without inference, one over the means of their losses.
    """
    found = {name: ratio.reciprocal().clamp_min(1.0) for name, ratio in ratios.items()}
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
    others: Others | None,
    exchange: Exchange,
) -> tuple[dict[Key, Tensor], Tensor]:
    """Gradient of ``Σ_k ℓ_k / max(1, ȳ_k²)`` at the features, over the heads of a batch.

    Args:
        batch: of this step.
        inverse: of :func:`inverse_levels`.
        weights: of all heads, ``[o, D]``.
        others: where there is no head, the losses, by whose sum the length goes.
        exchange: with the other ranks.

    Returns:
        gradients by key, ``[N, d]``, and squared lengths of these and of the plain ones, ``[2]``.
    """
    planned, plain = gradients(batch.parts, {}, [], inverse, weights)
    like = next(iter(inverse.values())).new_zeros(())
    lengths = squared_lengths(planned, plain, like)
    if others is not None:
        lengths = others.squared_sums(others.ratio.clamp_max(1.0))
    return planned, exchange.sum([lengths])[0]

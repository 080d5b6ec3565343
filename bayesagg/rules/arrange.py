"""Which heads share Gram matrices in a step, and what the rows of stacked units belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from bayesagg.heads import Head
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.memory import FadingMemory
from bayesagg.reading import Part
from bayesagg.rules.settings import Settings
from bayesagg.units import Frame, Unit

__all__ = ["arrange", "frame_of"]


def arrange(
    units: Sequence[Unit],
    heads: Mapping[str, Head],
    here: Mapping[str, Part],
    alone: set[str],
    counting: bool,
    like: Tensor,
) -> tuple[list[Unit], list[Unit]]:
    """Units of the heads that take part in a step; a unit is split where its heads differ.

    Args:
        units: that there are.
        heads: by name.
        here: the part of every head that is inferred in this step.
        alone: heads that cannot share Gram matrices in this step, because labels are missing or
            have weights, or that have none at all on some rank.
        counting: whether new units find out how many data there are.
        like: device and dtype of new units.

    Returns:
        the units that take part, and those that were split from them and do not.
    """
    found: list[Unit] = []
    idle: list[Unit] = []
    known: set[str] = set()
    for unit in units:
        known.update(unit.names)
        present = [name for name in unit.names if name in here]
        if not present:
            continue
        shared = (
            len(present) == len(unit.names)
            and len({here[name].key for name in present}) == 1
            and not alone.intersection(present)
        )
        for one in [unit] if shared else unit.alone(heads):
            (found if one.names[0] in here else idle).append(one)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in [name for name in here if name not in known]:
        head, own = heads[name], name if name in alone else None
        what = (here[name].key, head.has_bias, head.in_features, own)
        groups.setdefault(what, []).append(name)
    for key, names in groups.items():
        exact_first = sorted(names, key=lambda name: not BOUNDS[heads[name].kind].exact)
        found.append(Unit.empty(exact_first, heads, key[-1] is not None, counting, like))
    return found, idle


def frame_of(
    rule: Settings, memory: FadingMemory, units: Sequence[Unit], exact: int, like: Tensor
) -> Frame:
    """What the rows of stacked units belong to. Heads and rules are frozen, so it is made once.

    ``exact``: regressions among the columns of a unit, which come first; ``like``: ``[G, P]``.
    """
    shape = tuple(like.shape)
    key = (shape, like.device, *(unit.names for unit in units))
    frame = memory.frames.get(key)
    if frame is not None:
        return frame
    heads = [memory.heads[name] for unit in units for name in unit.names]
    columns = [head for head in heads for _ in range(head.out_features)]
    curvatures = [BOUNDS[head.kind].curvature_of(head.out_features) for head in columns]
    ridges = [1 / (c * rule.variance_of(h)) for c, h in zip(curvatures, columns, strict=True)]
    noises = [getattr(head, "noise_variance", None) for head in columns]
    fixed = [float(x) if isinstance(x, float | int) else 0.0 for x in noises]
    noise = like.new_tensor(fixed).view(shape)[:, :exact] if any(fixed) else None
    ridge = like.new_tensor(ridges).view(shape)
    sizes = [rule.small_of(head) * head.in_features for head in columns]
    small = like.new_tensor(sizes).view(shape)
    one = not exact and len(set(zip(ridges, sizes, strict=True))) == 1
    by_unit = [[memory.heads[name] for name in unit.names] for unit in units]
    frame = memory.frames[key] = Frame(
        [unit.names for unit in units],
        [unit.gram.shape[0] for unit in units] if units[0].wide else None,
        [[head.num_tasks for head in some] for some in by_unit],
        [[head.out_features for head in some] for some in by_unit],
        noise,
        ridge[:, :1] if one else ridge,
        exact,
        small[:, :1] if one else small,
        max(BOUNDS[head.kind].least_scale for head in heads),
    )
    return frame

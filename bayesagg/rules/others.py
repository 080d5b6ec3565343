"""Tasks of the default rule that are not inferred: their losses over running means of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.memory import FadingMemory
from bayesagg.parallel import Exchange
from bayesagg.reading import Batch
from bayesagg.units import running_mean

__all__ = ["Others", "others_of"]


@dataclass(frozen=True)
class Others:
    """Losses without a head, and heads that keep their own gradient, in a step.

    Attributes:
        names: of the ``T`` tasks.
        state: sum and weight of their running means before, ``[T, 2]``; zeros where there is none.
        values: of their losses and how many there are, 0 or 1, ``[T, 2]``.
        ratio: what the losses are multiplied by, ``[T]``.
    """

    names: list[str]
    state: Tensor
    values: Tensor
    ratio: Tensor

    def ratios(self, memory: FadingMemory) -> dict[str, Tensor]:
        """By task, ``[o]``."""
        pairs = zip(self.names, self.ratio, strict=True)
        return {name: ratio.expand(memory.tasks[name].num_tasks) for name, ratio in pairs}

    def squared_sums(self, ratio: Tensor) -> Tensor:
        """Of absolute values of the losses, times ``ratio`` ``[T]`` and as they are, ``[2]``."""
        value = self.values[:, 0].abs()
        return torch.stack([(ratio * value).sum(), value.sum()]).square_()

    def scales(self, sums: Tensor, decay: float) -> dict[str, Tensor]:
        """Running means after the step, ``[2]`` by task; ``sums``: the values of all ranks."""
        value, count = sums.unbind(1)
        mean = (value / count.clamp(min=1))[:, None]
        rows = mean, torch.ones_like(mean)
        moved = running_mean(self.state[..., None], rows, count > 0, decay)[..., 0]
        return dict(zip(self.names, moved, strict=True))


def others_of(
    memory: FadingMemory, batch: Batch, owning: Collection[str], like: Tensor, exchange: Exchange
) -> Others | None:
    """Of a step; ``None``: every task is inferred.

    ``owning``: heads that keep their own gradient. Ranks have to share the first scale, that of
    the batch.
    """
    names = [name for name in memory.tasks if name in owning or name not in memory.heads]
    if not names:
        return None
    one, found = torch.ones_like(like), [batch.losses.get(name) for name in names]
    value = [like if loss is None else loss.detach().to(like.dtype) for loss in found]
    here = [like if loss is None else one for loss in found]
    values = torch.stack([torch.stack(value), torch.stack(here)], 1)
    none = like.expand(2)
    state = torch.stack([memory.others.get(name, none) for name in names])
    first = values
    if any([name not in memory.others for name in names]):
        first = exchange.sum([values])[0]
    otherwise = first[:, 0] / first[:, 1].clamp(min=1)
    total, weight = state.unbind(1)
    scale = torch.where(weight > 0, total / weight, otherwise)
    ratio = torch.where(scale > 0, scale.reciprocal(), 1.0)
    return Others(names, state, values, ratio)

"""What a step is given, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.heads import Head
from bayesagg.reading.hooks import Call

__all__ = ["Batch", "Labels", "Part"]


@dataclass(frozen=True)
class Labels:
    """Verified labels of the tasks of a part.

    Attributes:
        outputs: ``[N, K]``, or ``[N, K, C]`` for multi-class tasks; at least float32.
        targets: of the same shape; finite also where not present.
        factor: the loss per unit of likelihood, ``[N, K]`` or ``[1, K]``, positive: a mean over
            ``B`` data with task weight ``c`` has factor ``c / B``.
        present: ``[N, K]`` booleans, or ``None`` where every label is there.
        nll: the loss of factor one, ``[N, K]``, where reading has come by it.
    """

    outputs: Tensor
    targets: Tensor
    factor: Tensor
    present: Tensor | None
    nll: Tensor | None = None

    @staticmethod
    def join(parts: Sequence[Labels]) -> Labels:
        """Labels of several heads side by side."""
        if len(parts) == 1:
            return parts[0]
        rows = len(parts[0].outputs)
        present = None
        if any(part.present is not None for part in parts):
            present = torch.cat(
                [
                    part.outputs.new_ones(part.outputs.shape[:2], dtype=torch.bool)
                    if part.present is None
                    else part.present
                    for part in parts
                ],
                dim=1,
            )
        factors = [part.factor for part in parts]
        if any(len(factor) != 1 for factor in factors):
            factors = [factor.expand(rows, -1) for factor in factors]
        return Labels(
            torch.cat([part.outputs for part in parts], dim=1),
            torch.cat([part.targets for part in parts], dim=1),
            torch.cat(factors, dim=1),
            present,
            torch.cat([p.nll for p in parts], 1)  # type: ignore[misc]
            if all(p.nll is not None for p in parts)
            else None,
        )

    def columns(self, start: int, stop: int) -> Labels:
        """The labels of tasks ``start`` to ``stop``."""
        present = None if self.present is None else self.present[:, start:stop]
        return Labels(
            self.outputs[:, start:stop],
            self.targets[:, start:stop],
            self.factor[:, start:stop],
            present,
        )

    def split(self, sizes: Sequence[int]) -> list[Labels]:
        """The labels of some tasks, and of those that follow, and so on."""
        parts = [part.split(sizes, 1) for part in (self.outputs, self.targets, self.factor)]
        rest = (
            [None] * len(sizes) if part is None else part.split(sizes, 1)
            for part in (self.present, self.nll)
        )
        return [Labels(*some) for some in zip(*parts, *rest, strict=True)]

    def rows(self, start: int, stop: int) -> Labels:
        """The labels of data ``start`` to ``stop``."""
        if start == 0 and stop >= len(self.outputs):
            return self
        return self.at(slice(start, stop))

    def at(self, index: Tensor | slice) -> Labels:
        """The labels of the data ``index``, ``[n]`` or a slice."""
        factor = self.factor if len(self.factor) == 1 else self.factor[index]
        present = None if self.present is None else self.present[index]
        return Labels(self.outputs[index], self.targets[index], factor, present)

    def count(self) -> Tensor:
        """Number of labels of every task, ``[K]``."""
        if self.present is None:
            return self.factor.new_full((self.factor.shape[1],), float(len(self.outputs)))
        return self.present.sum(0).to(self.factor.dtype)

    def weights(self) -> Tensor | None:
        """How much every datum counts for every task, ``[N, K]``; ``None``: all alike.

        The factor of its loss relative to the mean over the data that have a label, so that the
        scale of the loss has no say; booleans where that is the same for all.
        """
        factor, present = self.factor, self.present
        if factor.shape[0] == 1:
            return present
        if present is None:
            return factor / factor.mean(0)
        mean = (factor * present).sum(0) / present.sum(0).clamp(min=1)
        return torch.where(present, factor / torch.where(mean > 0, mean, 1), 0)

    def to(self, dtype: torch.dtype) -> Labels:
        """In another dtype."""
        return Labels(
            self.outputs.to(dtype), self.targets.to(dtype), self.factor.to(dtype), self.present
        )


@dataclass(frozen=True)
class Part:
    """Heads of one kind that read the same tensors in this step.

    Attributes:
        kind: of the heads; multi-class heads of a part have the same number of classes.
        names: of the heads.
        heads: in the same order.
        key: identity of the tensors they read: parts with equal keys share their features.
        calls: of every head, those whose output a loss depends on.
        features: rows of all calls below each other, ``[N, d]``, detached, in the network's dtype.
        gradient: of the sum of all losses at the outputs, ``[N, K]`` or ``[N, K, C]``.
        labels: ``None``: the losses are not the heads' likelihood, and all that is known of them
            is their gradient.
        slices: columns, of ``K``, of every head.
    """

    kind: str
    names: tuple[str, ...]
    heads: tuple[Head, ...]
    key: tuple[int, ...]
    calls: Mapping[str, Sequence[Call]]
    features: Tensor
    gradient: Tensor
    labels: Labels | None
    slices: Mapping[str, slice]

    @staticmethod
    def blank(name: str, head: Head, like: Tensor) -> Part:
        """No data at all, of a head that only other ranks have in this step."""
        shape = (0, head.num_tasks)
        if head.num_tasks != head.out_features:
            shape += (head.out_features,)  # type: ignore[assignment]
        none = like.new_zeros(shape)
        return Part(
            kind=head.kind,
            names=(name,),
            heads=(head,),
            key=(),
            calls={},
            features=like.new_zeros(0, head.in_features),
            gradient=none,
            labels=Labels(none, none, like.new_ones(1, head.num_tasks), None),
            slices={name: slice(0, head.num_tasks)},
        )


@dataclass(frozen=True)
class Batch:
    """A step's losses, and what was read off them.

    Attributes:
        parts: of all heads that take part; none where gradients overflowed.
        total: sum of all losses, those without a head included, with its graph.
        losses: by task, means of those that were not reduced, with their graphs.
        tasks: names of the heads that take part.
        overflowed: the losses are finite and a gradient is infinite (a scaled loss under a
            ``GradScaler``).
        alone: heads whose losses depend on nothing but their outputs.
    """

    parts: list[Part]
    total: Tensor
    losses: dict[str, Tensor]
    tasks: list[str]
    overflowed: bool = False
    alone: frozenset[str] = frozenset()

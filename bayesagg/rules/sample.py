"""The data of a step, of one rank, as the paper's rule takes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.likelihoods import Evidence
from bayesagg.posterior import Gaussian, augment
from bayesagg.reading import Batch, Labels
from bayesagg.rules.epochs import PaperMemory
from bayesagg.rules.groups import Group
from bayesagg.rules.subset import draw

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """The data that posterior and moments are computed from.

    Attributes:
        groups: of heads.
        rows: ``[n, d]``, in the network's dtype.
        features: ``h̃``, ``[n, D]``, by whether the constant of a bias is appended.
        labels: of each group.
        index: which of the batch these are; ``None``: all.
        scale: labelled data in the batch for each of them.
    """

    groups: Sequence[Group]
    rows: Tensor
    features: dict[bool, Tensor]
    labels: list[Labels]
    index: Tensor | None = None
    scale: float = 1.0

    @staticmethod
    def of(memory: PaperMemory, batch: Batch, own: Collection[str]) -> Sample:
        """All data of a batch.

        Args:
            memory: says which heads there are.
            batch: may have none of them.
            own: heads whose labels do not count.
        """
        parts = {n: part for part in batch.parts for n in part.names if n not in own}
        d = memory.groups[0].likelihood.d
        rows = batch.parts[0].features if batch.parts else batch.total.new_zeros(0, d)
        like = torch.zeros((), dtype=memory.dtype, device=rows.device)
        labels = [group.labels(parts, len(rows), like) for group in memory.groups]
        return Sample(memory.groups, rows, _augmented(memory.groups, rows, like), labels)

    def subset(self, max_data: int, generator: torch.Generator) -> Sample:
        """A random part of the data, or all if there are few enough."""
        found = draw(self.labels, len(self.rows), max_data, generator)
        if found is None:
            return self
        features = {bias: h[found.index] for bias, h in self.features.items()}
        labels = [known.at(found.index) for known in self.labels]
        rows = self.rows[found.index]
        return Sample(self.groups, rows, features, labels, found.index, found.scale)

    def evidence(self, uneven: Collection[str]) -> list[Evidence]:
        """Of every group; of a subset, an unbiased estimate of that of the batch.

        Args:
            uneven: heads whose data do not all count alike on some rank, so that they share no
                precision.
        """
        found = []
        for group, known in zip(self.groups, self.labels, strict=True):
            given = (self._features(group), known, known.weights())
            part = group.likelihood.evidence(*given)
            if any(name in uneven for name in group.heads):
                part = part.shared_by(group.num_tasks)
            found.append(part if self.scale == 1 else part.scaled(self.scale))
        return found

    def squares(self, posteriors: Sequence[Gaussian] | None = None) -> list[Tensor | None]:
        """What learned scales are the means of; ``None`` for groups that learn none."""
        found: list[Tensor | None] = [None] * len(self.groups)
        for i, (group, known) in enumerate(zip(self.groups, self.labels, strict=True)):
            if group.learns:
                posterior = None if posteriors is None else posteriors[i]
                given = (self._features(group), known, known.weights(), posterior)
                found[i] = group.likelihood.squares(*given) * self.scale
        return found

    def _features(self, group: Group) -> Tensor:
        return self.features[group.likelihood.bias]


def _augmented(groups: Sequence[Group], rows: Tensor, like: Tensor) -> dict[bool, Tensor]:
    h = rows.to(like.dtype)
    return {bias: augment(h, bias) for bias in {group.likelihood.bias for group in groups}}

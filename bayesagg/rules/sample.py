"""The data of a step, of one rank, as the paper's rule takes them: all, or some that are drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesagg.likelihoods import Evidence
from bayesagg.posterior import Gaussian, augment
from bayesagg.reading import Batch, Labels
from bayesagg.rules.epochs import PaperMemory
from bayesagg.rules.groups import Group

__all__ = ["Sample", "draw"]


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
        """All data of a batch, without the labels of the heads that are ``own``."""
        parts = {n: part for part in batch.parts for n in part.names if n not in own}
        groups = memory.groups
        none = batch.total.new_zeros(0, groups[0].likelihood.d)
        rows = batch.parts[0].features if batch.parts else none
        h = rows.to(memory.dtype)
        labels = [group.labels(parts, len(h), h[:0]) for group in groups]
        features = {bias: augment(h, bias) for bias in {group.likelihood.bias for group in groups}}
        return Sample(groups, rows, features, labels)

    def subset(self, max_data: int, generator: torch.Generator) -> Sample:
        """A random part of the data, or all if there are few enough."""
        found = draw(self.labels, len(self.rows), max_data, generator)
        if found is None:
            return self
        index, scale = found
        features = {bias: h[index] for bias, h in self.features.items()}
        labels = [known.at(index) for known in self.labels]
        return Sample(self.groups, self.rows[index], features, labels, index, scale)

    def evidence(self, uneven: Collection[str]) -> list[Evidence]:
        """Of every group; of a subset, an unbiased estimate of that of the batch.

        ``uneven``: heads whose data do not all count alike on some rank: they share no precision.
        """
        found = []
        for group, known in zip(self.groups, self.labels, strict=True):
            part = group.likelihood.evidence(self._features(group), known, known.weights())
            if any(name in uneven for name in group.heads):
                part = replace(part, precision=part.precision.expand(group.num_tasks, -1, -1))
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


def draw(
    labels: Sequence[Labels], rows: int, max_data: int, generator: torch.Generator
) -> tuple[Tensor, float] | None:
    """Places of some of ``rows`` data, and labelled data for each; ``None`` if there are few.

    Of those that have any label one is drawn from each of ``max_data`` equal stretches, so that
    every image or sequence gets its share; each datum has the same expected number of draws.
    """
    present = [known.present for known in labels if known.present is not None]
    candidates: Tensor | None = None
    if len(present) == len(labels):
        candidates = torch.stack([mask.any(1) for mask in present]).any(0).nonzero()[:, 0]
        rows = len(candidates)
    if rows <= max_data:
        return None
    device = generator.device
    place = torch.arange(max_data, dtype=torch.float64, device=device)
    place += torch.rand(max_data, dtype=torch.float64, device=device, generator=generator)
    index = place.mul_(rows / max_data).long().clamp_(max=rows - 1)
    return index if candidates is None else candidates[index], rows / max_data

"""Dense heads: posterior and moments from a random subset of the data, point gradients elsewhere.

With a pixel a datum, a batch has ``N = B·H·W`` data that say much the same. From ``n`` of them,
drawn anew in every step, come

- the evidence, scaled by ``N/n``: an unbiased estimate of the batch's ``(Λ, η)``;
- the exact gradient at h of those ``n``, Eq. 7;
- the mean weight ``ᾱ_kd`` of every task and dimension.

At every other datum the moments are replaced by the gradient at the posterior mean ``m_k``, whose
variance is not needed, and its weights by the mean ones::

    g_id = K Σ_k ᾱ_kd f_k e_k(h̃_iᵀ m_k) m_kd

with ``e`` the derivative of the likelihood, ``2 (z - y)``, ``σ(z) - y`` or ``p(z) - y``, and the
factor ``f`` of the loss: two products of matrices for all data. Where labels are missing, ``ᾱ_k``
is the mean over the data that have a label of task ``k``, made to sum to one over the tasks that
are present, and ``K`` is their number, as in Eq. 7. As ``S → 0`` both gradients agree for uniform
weights. This is a departure from the paper, which has no dense tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesagg.aggregation import GradientScale
from bayesagg.heads import Head
from bayesagg.likelihoods import Evidence
from bayesagg.posterior import Gaussian, augment
from bayesagg.reading import Batch, Labels
from bayesagg.reading.step import LIKELIHOODS
from bayesagg.rules.epochs import PaperMemory
from bayesagg.rules.groups import Group

__all__ = ["Sample", "draw", "extend", "mask_of"]


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


def mask_of(labels: Labels, rows: int) -> Tensor:
    """Labels present, ``[N, K]``, also where all are."""
    if labels.present is not None:
        return labels.present
    return labels.factor.new_ones(rows, labels.factor.shape[1], dtype=torch.bool)


def extend(
    sample: Sample,
    data: Sample,
    posteriors: Sequence[Gaussian],
    exact: Tensor,
    weights: Tensor,
    scale: GradientScale,
) -> Tensor:
    """The gradient of all data, ``[N, d]``, from that of a sample, ``exact``, ``[n, d]``.

    ``weights``: the mean ones over the labelled data of the sample, ``[K, d]``. The result has the
    dtype of the rows, or float32 at least.
    """
    h = data.rows.to(torch.promote_types(data.rows.dtype, torch.float32))
    gradient = torch.zeros_like(h)
    partial = any(known.present is not None for known in data.labels)
    alpha = (_given_a_label(weights, sample) if partial else weights).to(h.dtype)
    share = torch.zeros_like(h) if partial else None
    count = h.new_zeros(len(h), 1) if partial else h.new_full((1, 1), float(len(alpha)))
    shares = alpha.split([group.num_tasks for group in data.groups])
    for group, known, posterior, own in zip(
        data.groups, data.labels, posteriors, shares, strict=True
    ):
        for name, mean in group.means(posterior).items():
            part = group.slices[name]
            point = _residuals(group.heads[name], known, part, h, mean.to(h.dtype))
            gradient.addmm_(point.mT, own[part] * mean[:, : h.shape[1]].to(h.dtype))
        if share is not None:
            present = mask_of(known, len(h)).to(h.dtype)
            share.addmm_(present, own)
            count += present.sum(1, keepdim=True)
    if share is not None:
        gradient /= share.clamp_(min=torch.finfo(h.dtype).tiny)
    if scale == "sum":
        gradient *= count
    assert sample.index is not None
    return gradient.index_copy_(0, sample.index, exact.to(h.dtype))


def _residuals(head: Head, known: Labels, part: slice, h: Tensor, mean: Tensor) -> Tensor:
    """``f e`` of one head at its posterior mean ``[o, D]``; ``[o, N]``, 0 without a label.

    Outputs come first: a softmax over rows of a few classes takes twenty times as long.
    """
    z = mean[:, : h.shape[1]] @ h.mT
    if head.has_bias:
        z += mean[:, -1:]
    targets = known.targets[:, part]
    targets = (targets[:, 0] if targets.dim() == 3 else targets).to(h.dtype).mT
    residual = LIKELIHOODS[head.kind].residual(z, targets) * known.factor[:, part].to(h.dtype).mT
    if known.present is not None:
        residual.masked_fill_(~known.present[:, part].mT, 0)
    return residual


def _given_a_label(weights: Tensor, sample: Sample) -> Tensor:
    """Mean weights over the data that have a label of the task, from those over all data.

    A task without a label in the subset gets the weight of uniform ones.
    """
    masks = torch.cat([mask_of(known, len(sample.rows)) for known in sample.labels], dim=1)
    fraction = masks.to(weights.dtype).mean(0)[:, None] / masks.any(1).to(weights.dtype).mean()
    uniform = torch.full_like(weights, 1 / len(weights))
    return torch.where(fraction > 0, weights / fraction, uniform)

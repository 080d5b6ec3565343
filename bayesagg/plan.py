"""From a checked batch to what a backward pass will do, on one rank or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bayesagg.aggregation import GradientScale
from bayesagg.batch import Batch
from bayesagg.capture import unflatten
from bayesagg.combine import combine
from bayesagg.distributed import Exchange, ProcessGroup
from bayesagg.likelihoods import Block, Labels, Rule, Statistics
from bayesagg.posterior import Gaussian, augment
from bayesagg.subset import Subset, draw, extend, select

__all__ = ["Plan", "make_plan"]


@dataclass
class Plan:
    """What a backward pass will do; empty where it is plain linear scalarization."""

    gradient: Tensor | None = None
    evidence: list[Statistics] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def make_plan(
    batch: Batch,
    blocks: Sequence[Block],
    exchange: Exchange,
    group: ProcessGroup | None,
    *,
    pretraining: bool,
    scale: GradientScale,
    full: bool,
    seed: int,
    max_data: int | None = None,
    rule: Rule = "paper",
) -> Plan:
    """Evidence of the batch, of all ranks together, and the gradient at h of this rank's data.

    Args:
        batch: of this rank.
        blocks: whose evidence is of use in this epoch: all, or none.
        exchange: that sums over ranks.
        group: of the ranks; ``None``: there is one.
        pretraining: linear scalarization; only the evidence is wanted.
        scale: as of :func:`bayesagg.aggregation.aggregate_diagonal`.
        full: Eq. 6 instead of Eq. 7.
        seed: of Monte-Carlo samples and subsets.
        max_data: use a random subset of that many data (:mod:`bayesagg.subset`).
        rule: as of :class:`bayesagg.BayesAgg`.

    Raises:
        RankError: if another rank refused its batch.
        NumericalError: if a posterior precision could not be factorized.
    """
    h, evidence = batch.h, None
    generator = torch.Generator(h.device).manual_seed(seed)
    sample = _sample(batch, blocks, max_data, generator)
    if batch.labels:
        evidence = sample.evidence(blocks)
    if group is not None:
        evidence = exchange.reduce(group, blocks, evidence, h.device)
    if not evidence:  # not used in this epoch, or gradients overflowed
        return Plan()
    if pretraining:
        return Plan(evidence=evidence)
    posteriors = [block.step_posterior(part) for block, part in zip(blocks, evidence, strict=True)]
    places = sample.refine(blocks, posteriors, evidence)
    if group is not None and places:
        sums = exchange.sum(group, [extra[key] for extra, key in places])
        for (extra, key), value in zip(places, sums, strict=True):
            extra[key] = value
    # Cheap enough for all data, whatever the posteriors came from. Data of a subset, which count
    # several times there, are left out once.
    if rule == "likelihood":
        sample = _sample(batch, blocks, None, generator)
    gradient, weights = combine(
        blocks,
        sample.features,
        sample.labels,
        posteriors,
        scale=scale,
        full=full,
        generator=generator,
        dtype=_dtype_of_moments(h, blocks[0]),
        rule=rule,
    )
    if sample.subset is not None:
        # Only under the paper's rule, which needs every posterior.
        found = [posterior for posterior in posteriors if posterior is not None]
        estimate = (gradient, weights, scale)
        index = sample.subset.index
        gradient = extend(index, batch.rows, blocks, batch.labels, found, *estimate)
    gradient = unflatten(gradient, h, blocks[0].heads[0].channels_first)
    return Plan(gradient, evidence, _by_task(weights.mean(-1), blocks))


def _dtype_of_moments(h: Tensor, block: Block) -> torch.dtype:
    """No more digits than the gradient that moments make, but 32 bits of range."""
    own = torch.promote_types(h.dtype, torch.float32)
    return own if torch.finfo(own).bits < torch.finfo(block.dtype).bits else block.dtype


@dataclass
class _Sample:
    """The data of this rank that posterior and moments are computed from.

    Attributes:
        features: ``[n, d]`` by whether the constant of a bias is appended.
        labels: by block.
        subset: which of the batch; ``None``: all.
    """

    features: dict[bool, Tensor]
    labels: list[Labels]
    subset: Subset | None

    def evidence(self, blocks: Sequence[Block]) -> list[Statistics]:
        """Evidence of the batch, estimated where this is a subset."""
        # No blocks: of no use in this epoch.
        pairs = zip(blocks, self.labels, strict=bool(blocks))
        parts = [block.statistics(self.features[block.bias], known) for block, known in pairs]
        return parts if self.subset is None else [self.subset.upscale(part) for part in parts]

    def refine(
        self,
        blocks: Sequence[Block],
        posteriors: Sequence[Gaussian | None],
        evidence: Sequence[Statistics],
    ) -> list[tuple[dict[str, Tensor], str]]:
        """What evidence still needs of the posterior; returns where it was changed."""
        places: list[tuple[dict[str, Tensor], str]] = []
        parts = zip(blocks, self.labels, posteriors, evidence, strict=True)
        for block, known, posterior, part in parts:
            if posterior is None:  # nothing was inferred
                continue
            before = dict(part.extra)
            refine = block.refine if self.subset is None else partial(self.subset.refine, block)
            refine(self.features[block.bias], known, posterior, part)
            places += [(part.extra, k) for k, v in part.extra.items() if v is not before.get(k)]
        return places


def _sample(
    batch: Batch, blocks: Sequence[Block], max_data: int | None, generator: torch.Generator
) -> _Sample:
    subset = None
    if max_data is not None and batch.labels and blocks:
        subset = draw(batch.labels, len(batch.rows), max_data, generator)
    if not batch.labels or not blocks:
        return _Sample({}, batch.labels, None)
    rows = batch.rows if subset is None else batch.rows[subset.index]
    rows = rows.to(blocks[0].dtype)
    features = {bias: augment(rows, bias) for bias in {block.bias for block in blocks}}
    labels = batch.labels if subset is None else select(batch.labels, subset.index)
    return _Sample(features, labels, subset)


def _by_task(weights: Tensor, blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Weights of all outputs, ``[K]`` in the order of the blocks, by task."""
    parts = weights.split([block.num_tasks for block in blocks])
    return {
        name: part[rows]
        for block, part in zip(blocks, parts, strict=True)
        for name, rows in block.slices.items()
    }

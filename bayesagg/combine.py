"""From posteriors to the gradient at h: moments of all blocks, then Eq. 7 (or 6), in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesagg.aggregation import (
    GradientScale,
    aggregate_diagonal,
    aggregate_full,
    aggregate_uniform,
)
from bayesagg.likelihoods import Block, Labels, Rule
from bayesagg.posterior import Gaussian

__all__ = ["combine"]

_CHUNK = 1 << 18  # elements of a [n, K, d] tensor of moments; bounds the extra memory


def combine(
    blocks: Sequence[Block],
    features: Mapping[bool, Tensor],
    labels: Sequence[Labels],
    posteriors: Sequence[Gaussian | None],
    *,
    scale: GradientScale,
    full: bool,
    generator: torch.Generator,
    dtype: torch.dtype,
    rule: Rule = "paper",
) -> tuple[Tensor, Tensor]:
    """Aggregate the tasks' gradients at the shared representation.

    Args:
        blocks: of ``K`` tasks together.
        features: ``[N, d]`` by whether the constant of a bias is appended.
        labels: of each block.
        posteriors: of each block; ``None`` where its gradient does not depend on it.
        scale: as of :func:`bayesagg.aggregation.aggregate_diagonal`.
        full: Eq. 6 instead of Eq. 7.
        generator: of Monte-Carlo samples.
        dtype: of the moments and of Eq. 7, once the posteriors are known. Eq. 6, which solves
            with covariances, stays in the dtype of the posteriors.
        rule: as of :class:`bayesagg.BayesAgg`.

    Returns:
        gradient, ``[N, d]``, and the mean weight of every task and dimension over the labelled
        data, ``[K, d]``, in the order of the blocks. Under ``rule="likelihood"`` the scale of a
        likelihood is part of the weight: what the gradient of the loss is multiplied by, as share.
    """
    some = next(iter(features.values()))
    n, d, tasks = len(some), blocks[0].d, sum(block.num_tasks for block in blocks)
    work = some.dtype if full else dtype
    s = torch.cat([block.per_task("s", some.device) for block in blocks]).to(work)
    size = max(1, _CHUNK // (tasks * d * (d if full else 1)))
    gradient = torch.empty(n, d, dtype=work, device=some.device)
    totals, labelled = gradient.new_zeros(tasks, d), gradient.new_zeros(())
    # Nobody asks for it where all weights are alike.
    unit = _unit(labels) if rule == "paper" or blocks[0].weighted else None
    for start in range(0, n, size):
        stop = min(n, start + size)
        means, seconds, masks, ratios = [], [], [], []
        for block, known, posterior in zip(blocks, labels, posteriors, strict=True):
            part = known.rows(start, stop)
            h = features[block.bias][start:stop]
            second: Tensor | None
            if rule == "paper":
                assert posterior is not None
                mean, second = block.moments(h, part, posterior, generator, full, work)
            else:
                mean, second, ratio = block.gradients(h, part, posterior, generator, work)
                ratios.append(torch.ones_like(part.factor) if ratio is None else ratio)
            means.append(mean.mul_(part.factor[..., None].to(work)))
            if second is not None:
                assert unit is not None
                seconds.append(_scaled(second, part.factor[..., None] / unit, full))
            masks.append(part.present)
        present = _stack(masks, [mean.shape[1] for mean in means], stop - start, some.device)
        mean = _cat(means)
        if not seconds:
            gradient[start:stop], weights = aggregate_uniform(mean, present, scale)
        else:
            aggregate = aggregate_full if full else aggregate_diagonal
            gradient[start:stop], weights = aggregate(mean, _cat(seconds), s, present, scale)
        if ratios:
            ratio = torch.cat([part.expand(stop - start, -1) for part in ratios], 1)
            weights = weights * ratio[..., None]
        totals += weights.sum(0)
        labelled += stop - start if present is None else present.any(1).sum()
    if rule == "likelihood":
        labelled = totals.sum(0)
    return gradient, totals / labelled.clamp(min=torch.finfo(work).tiny)


def _cat(parts: list[Tensor]) -> Tensor:
    """Tasks of all blocks, ``[n, K, …]``, with the tasks outermost in memory."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(0, 1) for part in parts]).transpose(0, 1)


def _unit(labels: Sequence[Labels]) -> Tensor:
    """Mean factor of the tasks present, a scalar.

    Tasks are weighted relative to it, so that the scale common to all losses (mean or sum over
    the batch, a ``GradScaler``) has no say in Eq. 7 where tasks differ in ``s``.
    """
    total, count = [], []
    for known in labels:
        if known.present is None:
            total.append(known.factor.mean(0).sum())
            count.append(torch.full_like(total[-1], known.factor.shape[1]))
        else:
            seen = known.present.any(0)
            total.append((known.factor.mean(0) * seen).sum())
            count.append(seen.sum().to(known.factor.dtype))
    if len(labels) == 1:
        return total[0] / count[0].clamp(min=1)
    return torch.stack(total).sum() / torch.stack(count).sum().clamp(min=1)


def _scaled(second: Tensor, factor: Tensor, full: bool) -> Tensor:
    """Second moment of a loss with a factor: a covariance, or the logarithm of a variance."""
    if full:
        return second * factor[..., None].square()
    return second.add_(2 * factor.log().to(second.dtype))


def _stack(
    masks: list[Tensor | None], sizes: list[int], rows: int, device: torch.device
) -> Tensor | None:
    """Labels present, ``[n, K]``, or ``None`` where all are."""
    if all(mask is None for mask in masks):
        return None
    return _cat(
        [
            torch.ones(rows, size, dtype=torch.bool, device=device) if mask is None else mask
            for mask, size in zip(masks, sizes, strict=True)
        ]
    )

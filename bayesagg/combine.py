"""From posteriors to the gradient at h: moments of all blocks, then Eq. 7 (or 6), in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesagg.aggregation import (
    GradientScale,
    aggregate_full,
    aggregate_relative,
    aggregate_uniform,
)
from bayesagg.likelihoods import Block, Labels, Rule
from bayesagg.moments import LogMoments
from bayesagg.posterior import Gaussian

__all__ = ["combine"]

_CHUNK = 1 << 20  # elements of a [n, K, d] tensor of moments; bounds the extra memory


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
    s = _exponents(blocks, some.device, work)
    # Cancels where the tasks share an exponent, 0 in particular.
    unit = _unit(labels) if isinstance(s, Tensor) else 1.0
    size = max(1, _CHUNK // (tasks * d * (d if full else 1)))
    gradients, totals, labelled = [], [], []
    for start in range(0, n, size):
        rows = slice(start, min(n, start + size))
        means, seconds, ratios, masks = [], [], [], []
        for block, known, posterior in zip(blocks, labels, posteriors, strict=True):
            part = known.rows(rows.start, rows.stop)
            h = features[block.bias][rows]
            mean, second, ratio = _moments(block, h, part, posterior, generator, full, work)
            means.append(mean.mul_(part.factor[..., None].to(work)))
            if second is not None:
                seconds.append(_scaled(second, part.factor[..., None] / unit))
            ratios.append(ratio)
            masks.append(part.present)
        count = rows.stop - rows.start
        present = _stack(masks, [mean.shape[1] for mean in means], count, some.device)
        gradient, weights = _aggregate(_cat(means), seconds, s, present, scale)
        if rule == "likelihood":
            weights = weights * _cat_ratios(ratios, means)
        gradients.append(gradient)
        totals.append(weights.sum(0))
        labelled.append(count if present is None else present.any(1).sum())
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
    over = total.sum(0) if rule == "likelihood" else torch.as_tensor(sum(labelled))
    weights = total / over.clamp(min=torch.finfo(work).tiny)
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients), weights


def _moments(
    block: Block,
    features: Tensor,
    labels: Labels,
    posterior: Gaussian | None,
    generator: torch.Generator,
    full: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, LogMoments | Tensor | None, Tensor | None]:
    """Gradients of the block's tasks for factor one, their second moments, and ratios."""
    if block.rule == "likelihood":
        return block.gradients(features, labels, posterior, generator, dtype)
    assert posterior is not None
    if full:
        return *block.covariances(features, labels, posterior, generator), None
    moments = block.moments(features, labels, posterior, generator, dtype)
    return moments.mean, moments, None


def _scaled(second: LogMoments | Tensor, factor: Tensor) -> LogMoments | Tensor:
    """Second moments of a loss with a factor."""
    if isinstance(second, Tensor):
        return second * factor[..., None].square()
    offset = (2 * factor.log()).to(second.log_scale.dtype)
    return second._replace(log_scale=second.log_scale + offset)


def _aggregate(
    mean: Tensor,
    seconds: Sequence[LogMoments | Tensor],
    s: Tensor | float,
    present: Tensor | None,
    scale: GradientScale,
) -> tuple[Tensor, Tensor]:
    """Eq. 7 or 6, whichever the second moments are for, or a sum without any."""
    if not seconds:
        return aggregate_uniform(mean, present, scale)
    logs = [second for second in seconds if isinstance(second, LogMoments)]
    if logs:
        relative, log_scale = _cat([m.relative for m in logs]), _cat([m.log_scale for m in logs])
        return aggregate_relative(mean, relative, log_scale, s, present, scale)
    covariances = [second for second in seconds if isinstance(second, Tensor)]
    each = s if isinstance(s, Tensor) else mean.new_full((mean.shape[1],), s)
    return aggregate_full(mean, _cat(covariances), each, present, scale)


def _cat(parts: list[Tensor]) -> Tensor:
    """Tasks of all blocks, ``[n, K, …]``, with the tasks outermost in memory."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(0, 1) for part in parts]).transpose(0, 1)


def _exponents(blocks: Sequence[Block], device: torch.device, dtype: torch.dtype) -> Tensor | float:
    """``s`` of all tasks, ``[K]``, or the one that they share."""
    found = {float(head.s) for block in blocks for head in block.heads}
    if len(found) == 1:
        return found.pop()
    return torch.cat([block.per_task("s", device) for block in blocks]).to(dtype)


def _cat_ratios(ratios: Sequence[Tensor | None], means: Sequence[Tensor]) -> Tensor:
    """Ratios of all blocks, ``[n, K, 1]``; ``None`` is one."""
    parts = [
        mean.new_ones(mean.shape[:2]) if ratio is None else ratio.expand(mean.shape[:2])
        for ratio, mean in zip(ratios, means, strict=True)
    ]
    return torch.cat(parts, 1)[..., None]


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

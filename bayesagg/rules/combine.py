"""From posteriors to the gradient at h: moments of all groups, then Eq. 7 (or 6), in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesagg.aggregation import GradientScale, aggregate_full, aggregate_relative
from bayesagg.likelihoods import Given
from bayesagg.posterior import Gaussian
from bayesagg.reading import Labels
from bayesagg.rules.groups import Group
from bayesagg.rules.subset import Sample, mask_of

__all__ = ["combine"]

_CHUNK = 1 << 20  # elements of a [n, K, d] tensor of moments; bounds the extra memory


def combine(
    sample: Sample,
    posteriors: Sequence[Gaussian],
    *,
    scale: GradientScale,
    full: bool,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Aggregate the tasks' gradients at the shared representation, by Eq. 7, or ``full`` Eq. 6.

    Moments and Eq. 7 are computed in ``dtype`` once the posteriors are known; Eq. 6, which solves
    with covariances, in the dtype of the posteriors.

    Returns:
        gradient, ``[N, d]``, and the mean weight of every task and dimension over the data with
        any label, ``[K, d]``, in the order of the groups.
    """
    groups, some = sample.groups, next(iter(sample.features.values()))
    d, tasks = groups[0].likelihood.d, sum(group.num_tasks for group in groups)
    work = some.dtype if full else dtype
    s = _exponents(groups, some, work)
    # Cancels where the tasks share an exponent, 0 in particular.
    unit = _unit(sample.labels) if isinstance(s, Tensor) else 1.0
    size = max(1, _CHUNK // (tasks * d * (d if full else 1)))
    gradients, totals, labelled = [], [], []
    for start in range(0, len(some), size):
        stop = min(len(some), start + size)
        labels = [known.rows(start, stop) for known in sample.labels]
        means: list[Tensor] = []
        seconds: list[tuple[Tensor, ...]] = []
        for group, part, posterior in zip(groups, labels, posteriors, strict=True):
            likelihood, factor = group.likelihood, part.factor[..., None]
            h = sample.features[likelihood.bias][start:stop]
            given = Given(h, part.targets, posterior, generator)
            if full:
                mean, covariance = likelihood.covariances(given)
                seconds.append((covariance * (factor / unit)[..., None].square(),))
            else:
                mean, relative, log_scale = likelihood.moments(given, work)
                offset = (2 * (factor / unit).log()).to(log_scale.dtype)
                seconds.append((relative, log_scale + offset))
            means.append(mean.mul_(factor.to(work)))
        mean, second = _cat(means), [_cat(parts) for parts in zip(*seconds, strict=True)]
        everywhere = all(part.present is None for part in labels)
        present = None if everywhere else _cat([mask_of(part, stop - start) for part in labels])
        if full:
            gradient, weights = _by_matrices(mean, second[0], s, present, scale)
        else:
            gradient, weights = aggregate_relative(mean, second[0], second[1], s, present, scale)
        gradients.append(gradient)
        totals.append(weights.sum(0))
        labelled.append(stop - start if present is None else present.any(1).sum())
    weights = torch.stack(totals).sum(0) / torch.as_tensor(sum(labelled)).clamp(min=1)
    return torch.cat(gradients), weights


def _by_matrices(
    mean: Tensor,
    covariance: Tensor,
    s: Tensor | float,
    present: Tensor | None,
    scale: GradientScale,
) -> tuple[Tensor, Tensor]:
    """Eq. 6."""
    if present is not None and not bool(present.any()):  # nothing to solve for
        return torch.zeros_like(mean[:, 0]), mean.new_zeros(*mean.shape[:2], 1)
    each = s if isinstance(s, Tensor) else mean.new_full((mean.shape[1],), s)
    return aggregate_full(mean, covariance, each, present, scale)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Tasks of all groups, ``[n, K, …]``, with the tasks outermost in memory."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(0, 1) for part in parts]).transpose(0, 1)


def _exponents(groups: Sequence[Group], like: Tensor, dtype: torch.dtype) -> Tensor | float:
    """``s`` of all tasks, ``[K]``, or the one that they share."""
    found = [s for group in groups for s in group.s]
    if len(set(found)) == 1:
        return found[0]
    return torch.tensor(found, dtype=dtype, device=like.device)


def _unit(labels: Sequence[Labels]) -> Tensor:
    """Mean factor of the tasks present, a scalar.

    Tasks are weighted relative to it, so that the scale common to all losses (mean or sum over
    the batch, a ``GradScaler``) has no say in Eq. 7 where tasks differ in ``s``.
    """
    means = torch.cat([known.factor.mean(0) for known in labels])
    if all(known.present is None for known in labels):
        return means.mean()
    seen = torch.cat([(k.factor > 0 if k.present is None else k.present).any(0) for k in labels])
    return (means * seen).sum() / seen.sum().clamp(min=1)

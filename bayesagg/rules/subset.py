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

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesagg.aggregation import GradientScale
from bayesagg.heads import Head
from bayesagg.posterior import Gaussian
from bayesagg.reading import Labels
from bayesagg.reading.step import LIKELIHOODS
from bayesagg.rules.combine import mask_of
from bayesagg.rules.sample import Sample

__all__ = ["extend"]


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

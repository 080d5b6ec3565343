"""The default rule's gradients at the features of every head, and their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.moments import leave_one_out, student_gradient
from bayesagg.parallel import Exchange
from bayesagg.reading import Part
from bayesagg.rules.base import Key
from bayesagg.rules.others import Others
from bayesagg.rules.settings import Settings
from bayesagg.rules.stack import Stack, cat
from bayesagg.rules.streaming import Inference

__all__ = ["Exact", "exact_gradients", "gradients", "squared_lengths", "totals"]


@dataclass
class Exact:
    """What the exact likelihoods (regressions) of a stack say.

    Attributes:
        gradient: summed over their outputs and, by unit, over its Gram matrices; ``[N, d]`` each.
        sums: of squared leave-one-out residuals and of squared labels, ``[2, G, R]``.
        ratio: mean over the labelled data of what the loss is multiplied by, ``[G, R]``.
    """

    gradient: list[tuple[Key, Tensor]]
    sums: Tensor
    ratio: Tensor


def exact_gradients(rule: Settings, found: Inference) -> Exact:
    """Leave-one-out Student-t gradients of the regressions of a stack."""
    stack, r = found.stack, found.stack.exact
    if r == 0:
        none = found.current[:, :0]
        return Exact([], none.expand(2, -1, -1), none)
    # Passes over [G, N, R] take time by the byte: in the network's own precision.
    dtype, d = stack.precision(found.gram.dtype), stack.rows[0].shape[1]
    light = found.posterior.first(r).to(dtype)
    current = found.current[:, :r] if r < found.current.shape[1] else found.current
    # Zero while all labels are; of the smallest numbers there are no reciprocals.
    tau2 = current.to(dtype).clamp_min(torch.finfo(dtype).tiny / torch.finfo(dtype).eps)
    whole = r == stack.responses.shape[2]
    gradients, sums = [], []
    for rows in stack.chunks():
        targets = stack.of(stack.responses, rows)
        targets = targets if whole else targets[:, :, :r]
        weights = None if stack.weights is None else stack.of(stack.weights, rows).to(dtype)
        factor = stack.of(stack.factor, rows).to(dtype)
        h = stack.features(rows, found.gram.dtype)
        rotated = stack.rotated(rows, found.gram.dtype, found.posterior.vectors)
        left = leave_one_out(h, targets, found.posterior, weights, rotated, light)
        gradient, rho = student_gradient(
            left, light, d, tau2, factor, rule.degrees_of_freedom, weights
        )
        if len(stack.rows) == 1 and gradient.shape[0] > 1:  # all read the same
            gradient = gradient.sum(0, keepdim=True)
        gradients.append(gradient)
        pair = (left.residual, targets)
        weighted = pair if weights is None else [x * weights for x in pair]
        dots = [torch.linalg.vecdot(x, w, dim=1) for x, w in zip(pair, weighted, strict=True)]
        known = [] if weights is None else [(weights > 0).to(dtype)]
        rho = rho * known[0] if known else rho
        sums.append([torch.stack(dots), *[part.sum(1) for part in (rho, *known)]])
    squares, ratio, *labelled = [
        one[0] if len(one) == 1 else torch.stack(one).sum(0) for one in zip(*sums, strict=True)
    ]
    count = labelled[0].clamp(min=1.0) if labelled else float(stack.responses.shape[1])
    return Exact(_by_key(stack, cat(gradients, 1)), squares, ratio / count)


def _by_key(stack: Stack, gradient: Tensor) -> list[tuple[Key, Tensor]]:
    if len(stack.rows) == 1:
        return [(stack.parts[0].key, gradient[0])]
    pieces = zip(stack.parts, gradient.split(stack.sizes), strict=True)
    return [(part.key, g[0] if g.shape[0] == 1 else g.sum(0)) for part, g in pieces]


def gradients(
    parts: Sequence[Part],
    here: Mapping[str, Part],
    exact: Sequence[Exact],
    ratios: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """Gradients at the features of every key, as planned and as the losses have them."""
    planned: dict[Key, Tensor] = {}
    plain: dict[Key, Tensor] = {}

    def add(key: Key, gradient: Tensor) -> None:
        planned[key] = planned[key] + gradient if key in planned else gradient

    for one in exact:
        for key, gradient in one.gradient:
            if key:  # not of a part that only other ranks have
                add(key, gradient)
    readers: dict[Key, list[Part]] = {}
    for part in parts:
        readers.setdefault(part.key, []).append(part)
    for key, some in readers.items():
        flat = [p.gradient if p.gradient.dim() == 2 else p.gradient.flatten(1) for p in some]
        gradient = cat(flat, 1)
        rows = cat([weights[name] for part in some for name in part.names]).to(gradient.dtype)
        plain[key] = gradient @ rows
        scales: list[Tensor] = []
        kept: list[list[int]] = []  # columns from and to
        at = 0
        for part in some:
            exact_part = BOUNDS[part.kind].exact
            for name, head in zip(part.names, part.heads, strict=True):
                start, at = at, at + head.out_features
                if exact_part and name in here:
                    continue  # replaced altogether
                scales.append(ratios[name].expand(head.out_features))
                if kept and kept[-1][1] == start:
                    kept[-1][1] = at
                else:
                    kept.append([start, at])
        if scales and sum(head.num_tasks for part in some for head in part.heads) == 1:
            add(key, plain[key] * scales[0][0].to(gradient.dtype))  # one task, in another unit
        elif scales:
            if kept != [[0, at]]:
                gradient = cat([gradient[:, i:j] for i, j in kept], 1)
                rows = cat([rows[i:j] for i, j in kept])
            add(key, (gradient * cat(scales).to(gradient.dtype)) @ rows)
    return planned, plain


def totals(
    exact: Sequence[Exact], lengths: Tensor, others: Others | None, exchange: Exchange
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Sums over all ranks: squared residuals by stack, squared lengths, other losses if any."""
    if exchange.size > 1:  # the gradients of ranks are averaged
        lengths = lengths / exchange.size**2
    values = [] if others is None else [others.values]
    sums = exchange.sum([*[one.sums for one in exact], lengths, *values])
    n = len(exact)
    return sums[:n], sums[n], sums[n + 1 :]


def squared_lengths(
    planned: Mapping[Key, Tensor], plain: Mapping[Key, Tensor], like: Tensor
) -> Tensor:
    """Of the gradients of both kinds, at the same keys, ``[2]``; nothing where there are none."""
    if not planned:
        return like.expand(2)
    every = [*planned.values(), *plain.values()]
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in every])
    squares = norms.to(like.dtype).square_()
    return squares if len(plain) == 1 else squares.view(2, -1).sum(1)

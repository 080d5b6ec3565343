"""Regressions in closed form: sums over the data, noise by marginal likelihood, Student-t.

With the eigenvalues ``ω`` of ``Λ = H̃ᵀH̃`` every output is diagonal. For ``w ~ N(0, γ)`` and noise
``τ²`` the ridge is ``λ = τ²/γ``, the mean ``m = (Λ + λ)⁻¹ H̃ᵀy``, ``S = τ² (Λ + λ)⁻¹``. The noise is
where the marginal likelihood is stationary (MacKay 1992): ``τ² = |y - H̃m|² / ν`` with
``ν = n - Σ ω / (ω + λ)``, data less the parameters that they determine; ν is also the degrees of
freedom. A prior on request: ``γ = |m|² / Σ ω / (ω + λ)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.posterior import augment, weighted_gram
from bayesagg.predicting.data import Rows
from bayesagg.predicting.state import Inferred, Layout

__all__ = ["Prior", "Sums", "solve", "sums_of"]

_ITERATIONS, _TOLERANCE = 300, 1e-8
_LEAST = 1e-10  # of the labels' mean square: what a mean of squared residuals is known to
_LEAST_DOF = 3.0  # a variance exists from 2 on


@dataclass(frozen=True)
class Prior:
    """Of the weights of a head, bias included: ``N(0, γ I)``.

    Attributes:
        variance: γ, or where it starts.
        relative: regressions take it in units of the mean square of their labels.
        learned: by marginal likelihood.
    """

    variance: float = 1.0
    relative: bool = False
    learned: bool = False


@dataclass
class Sums:
    """Sufficient statistics of ``o`` regressions, in float64.

    Attributes:
        gram: ``Λ``, ``[1, D, D]``, or ``[o, D, D]`` where labels are missing.
        shift: ``H̃ᵀy``, ``[o, D]``.
        square: ``yᵀy``, ``[o]``.
        count: labels, ``[o]``.
    """

    gram: Tensor
    shift: Tensor
    square: Tensor
    count: Tensor

    @staticmethod
    def of(h: Tensor, targets: Tensor, present: Tensor | None, gram: Tensor) -> Sums:
        """Of some data.

        Args:
            h: ``h̃``, ``[N, D]``, float64.
            targets: ``[N, o]``, zero where missing.
            present: ``[N, o]``; ``None``: all.
            gram: ``H̃ᵀH̃``, ``[1, D, D]``, for the case that no label is missing.
        """
        y = targets.double()
        if present is None:
            count = y.new_full((y.shape[1],), float(len(y)))
        else:
            gram, count = weighted_gram(h, present.double()), present.sum(0).double()
        return Sums(gram, y.mT @ h, y.square().sum(0), count)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.shift + other.shift,
            self.square + other.square,
            self.count + other.count,
        )


def sums_of(piece: Mapping[str, Rows], layouts: Mapping[str, Layout]) -> dict[str, Sums]:
    """Of the regressions in a piece of data, which share the Gram matrix."""
    known: dict[bool, tuple[Tensor, Tensor]] = {}
    found = {}
    for task, rows in piece.items():
        if layouts[task].kind == "regression":
            bias = layouts[task].bias
            if bias not in known:
                h = augment(rows.features.double(), bias)
                known[bias] = h, (h.mT @ h)[None]
            h, gram = known[bias]
            found[task] = Sums.of(h, rows.targets, rows.present, gram)
    return found


def solve(
    sums: Mapping[str, Sums], priors: Mapping[str, Prior], noises: Mapping[str, float | None]
) -> dict[str, Inferred]:
    """Posteriors of heads; those on one Gram matrix are solved together.

    Args:
        sums: by task, over all data; every output has a label.
        priors: of the weights, by task.
        noises: τ², where it is given.

    Returns:
        by task, with degrees of freedom, infinite where the noise is given.
    """
    groups: dict[object, list[tuple[Tensor, list[str]]]] = {}
    for name, prior in ((name, priors[name]) for name in sums):
        gram, key = sums[name].gram, (prior.relative, prior.learned, noises[name] is None)
        like = groups.setdefault(key, [])
        names = next((n for g, n in like if len(gram) == 1 and torch.equal(g, gram)), None)
        if names is None:
            like.append((gram, [name]))
        else:
            names.append(name)
    found = {}
    for gram, names in (group for like in groups.values() for group in like):
        parts = [sums[name] for name in names]
        rows = [torch.cat([getattr(p, k) for p in parts]) for k in ("shift", "square", "count")]
        ones = [torch.ones_like(part.count) for part in parts]
        gamma = [one * priors[name].variance for name, one in zip(names, ones, strict=True)]
        given = [one * (noises[name] or 0.0) for name, one in zip(names, ones, strict=True)]
        noise = None if noises[names[0]] is None else torch.cat(given)
        together = _solve(Sums(gram, *rows), priors[names[0]], torch.cat(gamma), noise)
        start = 0
        for name, one in zip(names, ones, strict=True):
            found[name] = together.part(slice(start, start := start + len(one)))
    return found


def _solve(sums: Sums, prior: Prior, gamma: Tensor, noise: Tensor | None) -> Inferred:
    """With prior variances and given noises of every output, ``[o]``."""
    omega, vectors = torch.linalg.eigh(sums.gram)
    omega = omega.clamp_min(0)[:, None]
    # [G, P, D] with all outputs on one Gram matrix, or one output on each.
    shift = sums.shift[:, None] if len(vectors) > 1 else sums.shift[None]
    along = shift @ vectors
    count, square = (part.view(along.shape[:2]) for part in (sums.count, sums.square))
    level = (square / count).clamp_min(torch.finfo(square.dtype).tiny)
    gamma = gamma.view_as(level) * (level if prior.relative else 1.0)

    def updated(log: Tensor) -> Tensor:
        """Logarithms of τ² and γ, and where the evidence of the weights there puts them."""
        tau2, gamma = log.exp()
        inverse = 1 / (omega + (tau2 / gamma)[..., None])
        mean, known = along * inverse, (omega * inverse).sum(-1)
        if noise is None:
            rest = square - 2 * (along * mean).sum(-1) + (omega * mean.square()).sum(-1)
            tau2 = torch.maximum(rest, _LEAST * square) / (count - known).clamp_min(1.0)
        if prior.learned:
            gamma = mean.square().sum(-1) / known.clamp_min(1e-12)
            gamma = torch.minimum(torch.maximum(gamma, 1e-12 * level), 1e12 * level)
        return torch.stack([tau2, gamma]).log()

    at = torch.stack([level if noise is None else noise.view_as(level), gamma]).log()
    for _ in range(_ITERATIONS):
        first = updated(at)
        if bool(((first - at).abs() < _TOLERANCE).all()):
            break
        second = updated(first)
        # The steps shrink by a constant ratio in the end: where they would lead (Aitken).
        ratio = ((second - first) / (first - at)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 0.95)
        at = second + (second - first) * ratio / (1 - ratio)
    tau2, gamma = at.exp()
    inverse = 1 / (omega + (tau2 / gamma)[..., None])
    dof = (count - (omega * inverse).sum(-1)).clamp_min(_LEAST_DOF)
    return Inferred(
        ((along * inverse) @ vectors.mT).flatten(0, 1),
        vectors,
        inverse * tau2[..., None],
        noise=tau2.flatten(),
        dof=dof.flatten() if noise is None else torch.full_like(dof, torch.inf).flatten(),
    )

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

_ITERATIONS, _TOLERANCE = 300, 1e-11
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
    sums: Sums, prior: Prior, noise: float | None, spectra: list[tuple[Tensor, ...]]
) -> Inferred:
    """Posterior of a head.

    Args:
        sums: over all data; every output has a label.
        prior: of the weights.
        noise: τ², where it is given.
        spectra: Gram matrices with eigenvalues and eigenvectors, to look in and to add to.

    Returns:
        with degrees of freedom, infinite where the noise is given.
    """
    spectrum = next((known for known in spectra if torch.equal(known[0], sums.gram)), None)
    if spectrum is None:
        spectrum = (sums.gram, *torch.linalg.eigh(sums.gram))
        spectra.append(spectrum)
    omega, vectors = spectrum[1].clamp_min(0)[:, None], spectrum[2]
    # [G, P, D] with all outputs on one Gram matrix, or one output on each.
    shift = sums.shift[:, None] if len(vectors) > 1 else sums.shift[None]
    along = shift @ vectors
    count, square = (part.view(along.shape[:2]) for part in (sums.count, sums.square))
    level = (square / count).clamp_min(torch.finfo(square.dtype).tiny)
    gamma = prior.variance * (level if prior.relative else torch.ones_like(level))

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

    at = torch.stack([level if noise is None else torch.full_like(level, noise), gamma]).log()
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

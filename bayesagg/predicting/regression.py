"""Regressions in closed form: sums over the data, noise by marginal likelihood, Student-t.

With the eigenvalues ``ω`` of ``Λ = H̃ᵀH̃`` every output is diagonal. For ``w ~ N(0, γ)`` and noise
``τ²`` the ridge is ``λ = τ²/γ``, the mean ``m = (Λ + λ)⁻¹ H̃ᵀy``, ``S = τ² (Λ + λ)⁻¹``. The noise is
where the marginal likelihood is stationary (MacKay 1992): ``τ² = |y - H̃m|² / ν`` with
``ν = n - Σ ω / (ω + λ)``, data less the parameters that they determine; ν is also the degrees of
freedom. A prior on request: ``γ = |m|² / Σ ω / (ω + λ)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.posterior import regression_statistics
from bayesagg.predicting.state import Inferred

__all__ = ["Prior", "Sums", "solve"]

_ITERATIONS, _TOLERANCE = 1000, 1e-12
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
    """Sufficient statistics of a regression head with ``o`` outputs, in float64.

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
    def of(h: Tensor, targets: Tensor, present: Tensor | None, gram: Tensor | None = None) -> Sums:
        """Of a batch.

        Args:
            h: ``h̃``, ``[N, D]``, float64.
            targets: ``[N, o]``, zero where missing.
            present: ``[N, o]``; ``None``: all.
            gram: ``[1, D, D]``, where it is known and no label is missing.
        """
        y = targets.double()
        if present is None:
            if gram is None:
                gram = (h.mT @ h)[None]
            count = y.new_full((y.shape[1],), float(len(y)))
            return Sums(gram, y.mT @ h, y.square().sum(0), count)
        precision, shift = regression_statistics(h, y, present)
        return Sums(precision, shift, (y.square() * present).sum(0), present.sum(0).double())

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.gram + other.gram,
            self.shift + other.shift,
            self.square + other.square,
            self.count + other.count,
        )


def solve(sums: Sums, prior: Prior, noise: float | None) -> Inferred:
    """Posterior of a head.

    Args:
        sums: over all data; every output has a label.
        prior: of the weights.
        noise: τ², where it is given.

    Returns:
        with degrees of freedom, infinite where the noise is given.
    """
    omega, vectors = torch.linalg.eigh(sums.gram)
    omega = omega.clamp_min(0)[:, None] if len(omega) > 1 else omega.clamp_min(0)
    # [G, P, D] with all outputs on one Gram matrix, or one output on each.
    along = sums.shift[:, None] @ vectors if len(vectors) > 1 else (sums.shift @ vectors[0])[None]
    if len(vectors) == 1:
        omega = omega[:, None]
    shape = along.shape[:2]
    count, square = sums.count.view(shape), sums.square.view(shape)
    level = (square / count).clamp_min(torch.finfo(square.dtype).tiny)
    gamma = prior.variance * (level if prior.relative else torch.ones_like(level))
    tau2 = level if noise is None else torch.full_like(level, noise)
    for _ in range(_ITERATIONS):
        ridge = (tau2 / gamma)[..., None]
        mean = along / (omega + ridge)
        known = (omega / (omega + ridge)).sum(-1)
        before = torch.stack([tau2, gamma])
        if noise is None:
            rest = square - 2 * (along * mean).sum(-1) + (omega * mean.square()).sum(-1)
            rest = torch.maximum(rest, _LEAST * square)
            tau2 = rest / (count - known).clamp_min(1.0)
        if prior.learned:
            gamma = mean.square().sum(-1) / known.clamp_min(1e-12)
            gamma = torch.minimum(torch.maximum(gamma, 1e-12 * level), 1e12 * level)
        after = torch.stack([tau2, gamma])
        if bool(((after / before).log().abs() < _TOLERANCE).all()):
            break
    ridge = (tau2 / gamma)[..., None]
    inverse = 1 / (omega + ridge)
    mean = (along * inverse) @ vectors.mT
    dof = (count - (omega * inverse).sum(-1)).clamp_min(_LEAST_DOF)
    if noise is not None:
        dof = torch.full_like(dof, torch.inf)
    return Inferred(
        mean.flatten(0, 1),
        vectors,
        inverse * tau2[..., None],
        noise=tau2.flatten(),
        dof=dof.flatten(),
    )

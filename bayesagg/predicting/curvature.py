"""Curvatures of classifications at a point, with that of the prior, and posteriors around modes.

Both kinds are of ``G`` independent problems of ``M`` weights: binary outputs, or all contrasts of
classes. Their ``basis`` is that of the contrasts, ``[E, C]``; ``None`` of binary outputs.
``precision`` is that of the prior, ``[G]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesagg.predicting.state import Inferred

__all__ = ["Curvature", "Exact", "Kronecker"]


@dataclass(frozen=True)
class Exact:
    """``Λ + precision`` with the matrix ``Λ``, ``[G, M, M]``."""

    matrix: Tensor
    precision: Tensor
    basis: Tensor | None

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor, ``[G, M, M]``."""
        total = self.matrix.clone()
        total.diagonal(dim1=-2, dim2=-1).add_(self.precision[:, None])
        factor: Tensor = torch.linalg.cholesky(total)
        return factor

    @cached_property
    def whitener(self) -> Tensor:
        """Inverse of the factor."""
        identity = torch.eye(self.matrix.shape[-1]).to(self.matrix)
        whitener: Tensor = torch.linalg.solve_triangular(self.factor, identity, upper=False)
        return whitener

    def solve(self, gradient: Tensor) -> Tensor:
        """``(Λ + precision)⁻¹ gradient``, ``[G, M]``."""
        solved: Tensor = torch.cholesky_solve(gradient[..., None], self.factor)
        return solved[..., 0]

    def determined(self) -> Tensor:
        """``tr Λ (Λ + precision)⁻¹``, ``[G]``."""
        trace = self.whitener.square().sum((1, 2))
        return (self.matrix.shape[-1] - self.precision * trace).clamp_min(0)

    def inferred(self, mean: Tensor) -> Inferred:
        """The posterior around a mode, ``[G, M]``."""
        if self.basis is None:
            # Any V with S = V Vᵀ will do for eigenvectors, and this one costs a tenth.
            return Inferred(mean, self.whitener.mT, torch.ones_like(mean)[:, None])
        columns = len(self.basis)
        root = self.whitener[0].view(mean.shape[1], columns, -1)
        return Inferred(self.basis.mT @ mean.view(columns, -1), rotation=self.basis.mT, root=root)


@dataclass(frozen=True)
class Kronecker:
    """``C̄ ⊗ H̃ᵀH̃ + precision`` by the eigenvalues of both; methods as of :class:`Exact`.

    Attributes:
        left: eigenvalues of ``C̄``, ``[P]``; of binary outputs their mean curvatures.
        turn: its eigenvectors, ``[P, P]``; ``None`` of binary outputs.
        values: eigenvalues of the Gram matrix, ``[D]``.
        vectors: its eigenvectors.
    """

    left: Tensor
    turn: Tensor | None
    values: Tensor
    vectors: Tensor
    precision: Tensor
    basis: Tensor | None

    @cached_property
    def inverse(self) -> Tensor:
        """Along the eigenvectors, ``[P, D]``."""
        return 1 / (self.left[:, None] * self.values + self.precision[:, None])

    def solve(self, gradient: Tensor) -> Tensor:
        """As of :class:`Exact`."""
        turned = gradient.view(len(self.left), -1) @ self.vectors
        if self.turn is None:
            turned = turned * self.inverse
        else:
            turned = self.turn @ (self.turn.mT @ turned * self.inverse)
        return (turned @ self.vectors.mT).view_as(gradient)

    def determined(self) -> Tensor:
        """As of :class:`Exact`."""
        share = 1 - self.precision[:, None] * self.inverse
        return share.view(len(self.precision), -1).sum(1)

    def inferred(self, mean: Tensor) -> Inferred:
        """As of :class:`Exact`."""
        parts = self.vectors[None], self.inverse[None]
        if self.basis is None or self.turn is None:
            return Inferred(mean, *parts)
        back = self.basis.mT
        return Inferred(back @ mean.view(len(self.left), -1), *parts, rotation=back @ self.turn)


Curvature = Exact | Kronecker

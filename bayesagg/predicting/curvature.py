"""Curvatures of classifications at a point, and the posteriors around a mode."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesagg.predicting.state import Inferred

__all__ = ["Curvature", "Exact", "Kronecker"]


@dataclass(frozen=True)
class Exact:
    """Of ``G`` independent problems of ``M`` weights: binary outputs, or all contrasts of classes.

    Attributes:
        matrix: ``Λ``, ``[G, M, M]``.
        basis: of the contrasts, ``[E, C]``; ``None`` of binary outputs.
    """

    matrix: Tensor
    basis: Tensor | None
    _known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def factor(self, precision: Tensor) -> Tensor:
        """Cholesky factor of ``Λ + precision``, kept for the steps that it serves."""
        known = self._known.get("factor")
        if known is None or not torch.equal(known[0], precision):
            total = self.matrix.clone()
            total.diagonal(dim1=-2, dim2=-1).add_(precision[:, None])
            known = self._known["factor"] = (precision, torch.linalg.cholesky(total))
        return known[1]

    def solve(self, gradient: Tensor, precision: Tensor) -> Tensor:
        """``(Λ + precision)⁻¹ gradient``, ``[G, M]``; ``precision``: of the prior, ``[G]``."""
        solved: Tensor = torch.cholesky_solve(gradient[..., None], self.factor(precision))
        return solved[..., 0]

    def determined(self, precision: Tensor) -> Tensor:
        """``tr Λ (Λ + precision)⁻¹``, ``[G]``."""
        omega = torch.linalg.eigvalsh(self.matrix).clamp_min(0)
        share: Tensor = omega / (omega + precision[:, None])
        return share.sum(1)

    def inferred(self, mean: Tensor, precision: Tensor) -> Inferred:
        """The posterior around a mode, ``[G, M]``."""
        factor = self.factor(precision)
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        whitener = torch.linalg.solve_triangular(factor, identity, upper=False)
        if self.basis is None:
            # Any V with S = V Vᵀ will do for eigenvectors, and this one costs a tenth.
            return Inferred(mean, whitener.mT, torch.ones_like(mean)[:, None])
        columns = len(self.basis)
        root = whitener[0].view(mean.shape[1], columns, -1)
        return Inferred(self.basis.mT @ mean.view(columns, -1), rotation=self.basis.mT, root=root)


@dataclass(frozen=True)
class Kronecker:
    """``C̄ ⊗ H̃ᵀH̃`` by the eigenvalues of both; members as of :class:`Exact`.

    Attributes:
        left: eigenvalues of ``C̄``, ``[P]``; of binary outputs their mean curvatures.
        turn: its eigenvectors, ``[P, P]``; ``None`` of binary outputs.
        values: eigenvalues of the Gram matrix, ``[D]``.
        vectors: its eigenvectors.
        basis: as of :class:`Exact`.
    """

    left: Tensor
    turn: Tensor | None
    values: Tensor
    vectors: Tensor
    basis: Tensor | None

    def solve(self, gradient: Tensor, precision: Tensor) -> Tensor:
        """As of :class:`Exact`."""
        turned = gradient.view(len(self.left), -1) @ self.vectors
        if self.turn is not None:
            turned = self.turn.mT @ turned
        turned = turned * self._inverse(precision)
        if self.turn is not None:
            turned = self.turn @ turned
        return (turned @ self.vectors.mT).view_as(gradient)

    def determined(self, precision: Tensor) -> Tensor:
        """As of :class:`Exact`."""
        left = 1 - precision[:, None] * self._inverse(precision)
        return left.view(len(precision), -1).sum(1)

    def inferred(self, mean: Tensor, precision: Tensor) -> Inferred:
        """As of :class:`Exact`."""
        variances, rotation = self._inverse(precision)[None], None
        if self.basis is not None and self.turn is not None:
            mean, rotation = (
                self.basis.mT @ mean.view(len(self.left), -1),
                self.basis.mT @ self.turn,
            )
        return Inferred(mean, self.vectors[None], variances, rotation)

    def _inverse(self, precision: Tensor) -> Tensor:
        return 1 / (self.left[:, None] * self.values + precision[:, None])


Curvature = Exact | Kronecker

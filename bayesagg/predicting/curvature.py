"""Curvatures of classifications at a point, and the posteriors around a mode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bayesagg.posterior import contrast_basis
from bayesagg.predicting.state import Inferred

__all__ = ["Contrasts", "Curvature", "Kronecker", "Outputs"]


class Curvature(Protocol):
    """Of ``G`` independent problems of ``M`` weights."""

    def solve(self, gradient: Tensor, precision: Tensor) -> Tensor:
        """``(Λ + precision)⁻¹ gradient``, ``[G, M]``; ``precision``: of the prior, ``[G]``."""

    def determined(self, precision: Tensor) -> Tensor:
        """``tr Λ (Λ + precision)⁻¹``, ``[G]``."""

    def inferred(self, mean: Tensor, precision: Tensor) -> Inferred:
        """The posterior around a mode ``[G, M]``."""


@dataclass(frozen=True)
class Outputs:
    """Of binary outputs, ``[o, D, D]``."""

    matrix: Tensor
    _known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def factor(self, precision: Tensor) -> Tensor:
        """Cholesky factor of ``Λ + precision``, kept for the steps that it serves."""
        known = self._known.get("factor")
        if known is None or not torch.equal(known[0], precision):
            known = (precision, torch.linalg.cholesky(_with(self.matrix, precision)))
            self._known["factor"] = known
        return known[1]

    def solve(self, gradient: Tensor, precision: Tensor) -> Tensor:
        """As of :class:`Curvature`."""
        solved: Tensor = torch.cholesky_solve(gradient[..., None], self.factor(precision))
        return solved[..., 0]

    def determined(self, precision: Tensor) -> Tensor:
        """As of :class:`Curvature`."""
        omega = torch.linalg.eigvalsh(self.matrix).clamp_min(0)
        share: Tensor = omega / (omega + precision[:, None])
        return share.sum(1)

    def inferred(self, mean: Tensor, precision: Tensor) -> Inferred:
        """As of :class:`Curvature`."""
        factor = self.factor(precision)
        # Any V with S = V Vᵀ will do for eigenvectors, and this one costs a tenth.
        whitener = torch.linalg.solve_triangular(factor, _identity(factor), upper=False)
        return Inferred(mean, whitener.mT, torch.ones_like(mean)[:, None])


@dataclass(frozen=True)
class Contrasts(Outputs):
    """Of classes, one matrix over all contrasts, ``[1, E·D, E·D]``."""

    classes: int = field(kw_only=True)

    def inferred(self, mean: Tensor, precision: Tensor) -> Inferred:
        """As of :class:`Curvature`."""
        basis = contrast_basis(self.classes, mean)
        factor = self.factor(precision)[0]
        root = torch.linalg.solve_triangular(factor, _identity(factor), upper=False)
        contrasts = mean.view(len(basis), -1)
        return Inferred(
            basis.mT @ contrasts,
            rotation=basis.mT,
            root=root.view(len(root), len(basis), -1),
        )


@dataclass(frozen=True)
class Kronecker:
    """Of classes, ``C̄ ⊗ H̃ᵀH̃`` by the eigenvalues of both."""

    left: tuple[Tensor, Tensor]  # values [E], vectors [E, E]
    right: tuple[Tensor, Tensor]  # values [D], vectors [D, D]

    def _values(self) -> Tensor:
        return self.left[0][:, None] * self.right[0]

    def solve(self, gradient: Tensor, precision: Tensor) -> Tensor:
        """As of :class:`Curvature`."""
        u, q = self.left[1], self.right[1]
        turned = u.mT @ gradient.view(len(u), -1) @ q / (self._values() + precision)
        return (u @ turned @ q.mT).reshape(1, -1)

    def determined(self, precision: Tensor) -> Tensor:
        """As of :class:`Curvature`."""
        values = self._values()
        return (values / (values + precision)).sum().view(1)

    def inferred(self, mean: Tensor, precision: Tensor) -> Inferred:
        """As of :class:`Curvature`."""
        u, q = self.left[1], self.right[1]
        basis = contrast_basis(len(u) + 1, mean)
        variances = 1 / (self._values() + precision)
        return Inferred(basis.mT @ mean.view(len(u), -1), q[None], variances[None], basis.mT @ u)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _with(matrix: Tensor, precision: Tensor) -> Tensor:
    total = matrix.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(precision[:, None])
    return total

"""Gaussian posteriors over head weights, in natural parameters.

Precision ``Λ`` and shift ``η = Λ · mean`` of independent pieces of evidence add up: the batch
posterior is *prior + batch*, the full-data posterior is *isotropic prior + Σ batches*, and a
missing label is simply not added. All functions are pure and work on plain tensors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesagg.constants import kept
from bayesagg.errors import NumericalError, NumericalWarning

__all__ = [
    "Gaussian",
    "augment",
    "binary_statistics",
    "contrast_basis",
    "from_natural",
    "multiclass_statistics",
    "regression_statistics",
    "weighted_gram",
]

# Relative to the diagonal of the precision; each is tried only where the one before failed.
_JITTERS = (1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)


@dataclass(frozen=True)
class Gaussian:
    """``K`` normal distributions ``N(mean, S)`` over ``M`` weights each.

    Attributes:
        mean: ``[K, M]``.
        factor: lower Cholesky factor of the precision ``S⁻¹``, ``[G, M, M]``; ``G`` is ``K``, or 1
            where all outputs share one covariance.
    """

    mean: Tensor
    factor: Tensor

    @cached_property
    def whitener(self) -> Tensor:
        """Inverse of ``factor``, ``[G, M, M]``: ``S = whitenerᵀ whitener``."""
        return _inverse(self.factor)

    @cached_property
    def covariance(self) -> Tensor:
        """``S``, shape ``[G, M, M]``."""
        return torch.cholesky_inverse(self.factor)

    @property
    def variance(self) -> Tensor:
        """Diagonal of ``S``, shape ``[G, M]``."""
        return self.whitener.square().sum(-2)

    @property
    def tasks(self) -> list[Gaussian]:
        """One Gaussian a task."""
        # A cached list of itself would be a cycle, and large tensors wait for the collector.
        return [self] if len(self.mean) == 1 else self._parts

    @cached_property
    def _parts(self) -> list[Gaussian]:
        """Kept, because each keeps its inverse factor."""
        factors = self.factor.expand(len(self.mean), -1, -1).split(1)
        return [Gaussian(m, f) for m, f in zip(self.mean.split(1), factors, strict=True)]

    def scaled(self, variance: Tensor) -> Gaussian:
        """The same means with the covariance of output k times ``variance[k]``, ``[K]``."""
        sd = variance.sqrt()[:, None, None]
        gaussian = Gaussian(self.mean, self.factor / sd)
        gaussian.__dict__["whitener"] = self.whitener * sd  # what its cached property would compute
        return gaussian

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights, shape ``[num_samples, K, M]``."""
        noise = torch.randn(
            (*self.mean.shape, num_samples),
            generator=generator,
            dtype=self.mean.dtype,
            device=self.mean.device,
        )
        deviation: Tensor = torch.linalg.solve_triangular(self.factor.mT, noise, upper=True)
        return (self.mean[..., None] + deviation).movedim(-1, 0)


def augment(features: Tensor, bias: bool) -> Tensor:
    """``h̃ = [h, 1]``: append the constant that multiplies a bias; ``[N, d]`` to ``[N, D]``."""
    if not bias:
        return features
    return torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)


def _cholesky(precision: Tensor) -> Tensor:
    """Lower Cholesky factor ``[G, M, M]``; jitter where needed, announced with its amount."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(precision)
    if not info.any():
        return factor
    failed = info > 0
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    for jitter in _JITTERS:
        added = jitter * diagonal * failed[:, None]
        factor, info = torch.linalg.cholesky_ex(precision + torch.diag_embed(added))
        if not (info > 0).any():
            warnings.warn(
                f"A posterior precision was not positive definite to rounding: added jitter "
                f"{jitter:.0e} times its diagonal (at most {float(added.max()):.3g}). Constant, "
                f"duplicated or badly scaled features cause this; normalise the representation "
                f"or lower `prior_variance`.",
                NumericalWarning,
                stacklevel=2,
            )
            return factor
    raise NumericalError(
        f"A posterior precision could not be factorized, even with jitter {_JITTERS[-1]:.0e} "
        f"times its diagonal. Check the scale of the shared representation (largest diagonal "
        f"entry {float(diagonal.max()):.3g}) or lower `prior_variance`."
    )


def _inverse(factor: Tensor) -> Tensor:
    """Inverse of a lower triangular ``[G, M, M]``, solved in place: large ones cost page faults."""
    groups, size, _ = factor.shape
    result = torch.eye(size, dtype=factor.dtype, device=factor.device).repeat(groups, 1, 1).mT
    torch.linalg.solve_triangular(factor, result, upper=False, out=result)
    return result


def from_natural(precision: Tensor, shift: Tensor) -> Gaussian:
    """Gaussian with the given natural parameters.

    Args:
        precision: ``Λ``, ``[G, M, M]``, symmetric positive definite; ``G`` is ``K`` or 1.
        shift: ``η = Λ · mean``, ``[K, M]``.

    Raises:
        NumericalError: if no factorization exists even with jitter.

    Warns:
        NumericalWarning: if jitter was added, with the amount.
    """
    factor = _cholesky(precision)
    # Not by the inverse factor, which loses the digits that a bad condition leaves.
    if len(factor) == 1:
        return Gaussian(torch.cholesky_solve(shift.mT, factor[0]).mT, factor)
    return Gaussian(torch.cholesky_solve(shift[..., None], factor)[..., 0], factor)


def weighted_gram(features: Tensor, weights: Tensor, chunk: int = 1 << 22) -> Tensor:
    """``H̃ᵀ diag(weights_k) H̃`` for every k.

    Args:
        features: ``H̃``, ``[N, D]``.
        weights: ``[N, K]``, of either sign.
        chunk: number of elements of the ``[K, n, D]`` intermediate; bounds the extra memory.

    Returns:
        ``[K, D, D]``.
    """
    rows = max(1, chunk // (weights.shape[1] * features.shape[1]))
    total: Tensor | None = None
    for h, w in zip(features.split(rows), weights.split(rows), strict=True):
        part = (h[None] * w.mT[..., None]).mT @ h
        total = part if total is None else total.add_(part)
    if total is None:  # no data at all
        return features.new_zeros(weights.shape[1], features.shape[1], features.shape[1])
    return total


def regression_statistics(
    features: Tensor, targets: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Evidence of a batch under a Gaussian likelihood of unit noise (Eq. 2 with τ = 1).

    Args:
        features: ``H̃``, ``[N, D]``.
        targets: ``[N, K]``; entries that are not present must be finite and are ignored.
        present: ``[N, K]`` booleans, or ``None`` where every label is there.

    Returns:
        ``H̃ᵀH̃`` (``[1, D, D]``, or ``[K, D, D]`` with missing labels) and ``H̃ᵀy`` (``[K, D]``);
        divide both by τ² for another noise variance.
    """
    if present is None:
        return (features.mT @ features)[None], targets.mT @ features
    mask = present.to(features.dtype)
    return weighted_gram(features, mask), (targets * mask).mT @ features


def binary_statistics(
    features: Tensor, targets: Tensor, logits: Tensor, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quadratic expansion of the Bernoulli log-likelihood at ``ŵ`` (Eq. 8-10, per output).

    ``Λ = H̃ᵀ diag(p(1-p)) H̃`` and ``η = Λ ŵ - H̃ᵀ(p - y) = H̃ᵀ(p(1-p) z - (p - y))`` with
    ``z = H̃ŵ``, ``p = σ(z)``. In the second form an error of ``z``, as of low precision, enters the
    gradient of the expansion at ``ŵ`` squared.

    Args:
        features: ``H̃``, ``[N, D]``.
        targets: probabilities ``[N, K]``; ignored where not present.
        logits: ``z``, ``[N, K]``.
        present: ``[N, K]`` booleans, or ``None``.

    Returns:
        ``Λ`` (``[K, D, D]``) and ``η`` (``[K, D]``).
    """
    p = torch.sigmoid(logits)
    curvature, residual = p * torch.sigmoid(-logits), p - targets
    if present is not None:
        curvature, residual = curvature * present, residual * present
    shift = torch.addcmul(-residual, curvature, logits).mT @ features
    return weighted_gram(features, curvature), shift


def contrast_basis(num_classes: int, like: Tensor) -> Tensor:
    """Orthonormal rows orthogonal to the vector of ones (Helmert), ``[C - 1, C]``.

    A softmax depends on its logits through these ``E = C - 1`` contrasts only: neither the
    likelihood nor the gradient involves the common mode, whose posterior is the prior. All
    multi-class algebra is done in contrasts, exactly, with (C-1)·D in place of C·D weights.
    """
    return _contrasts(num_classes, like.dtype, like.device)


@kept
def _contrasts(num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = torch.arange(1, num_classes, dtype=dtype, device=device)
    basis = torch.ones(num_classes - 1, num_classes, dtype=dtype, device=device).tril()
    basis.diagonal(1).copy_(-rows)
    return basis / (rows * (rows + 1)).sqrt()[:, None]


@kept
def _blocks(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of an upper triangle, and which of them every entry is, ``[E, E]``."""
    row, column = torch.triu_indices(size, size, device=device)
    block_of = torch.zeros(size, size, dtype=torch.long, device=device)
    block_of[row, column] = block_of[column, row] = torch.arange(len(row), device=device)
    return row, column, block_of


def multiclass_statistics(
    features: Tensor,
    targets: Tensor,
    logits: Tensor,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quadratic expansion of the categorical log-likelihood, in contrasts (Eq. 8-10).

    With ``C_i = Q(diag p_i - p_i p_iᵀ)Qᵀ`` and ``Q`` of :func:`contrast_basis`,
    ``Λ = Σ_i C_i ⊗ h̃_i h̃_iᵀ`` and ``η = Λ vec(Qŵ) - vec Σ_i Q(p_i - y_i) h̃_iᵀ``
    ``= vec Σ_i (C_i Q z_i - Q(p_i - y_i)) h̃_iᵀ``, as in :func:`binary_statistics`.

    Args:
        features: ``H̃``, ``[N, D]``.
        targets: probabilities ``[N, C]``; ignored where not present.
        logits: ``z``, ``[N, C]``.
        present: ``[N]`` booleans, or ``None``.

    Returns:
        ``Λ`` (``[E·D, E·D]``, class contrast major) and ``η`` (``[E·D]``).
    """
    basis = contrast_basis(logits.shape[1], logits)
    p = torch.softmax(logits, dim=1)
    residual = (p - targets) @ basis.mT
    mean = p @ basis.mT
    curvature = (p[:, None, :] * basis) @ basis.mT - mean[:, :, None] * mean[:, None, :]
    if present is not None:
        residual, curvature = residual * present[:, None], curvature * present[:, None, None]
    e, d = basis.shape[0], features.shape[1]
    row, column, block_of = _blocks(e, logits.device)
    blocks = weighted_gram(features, curvature[:, row, column])
    precision = blocks[block_of].transpose(1, 2).reshape(e * d, e * d)
    response = (curvature @ (logits @ basis.mT)[..., None])[..., 0] - residual
    return precision, (response.mT @ features).reshape(-1)

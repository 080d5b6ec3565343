"""Regression with noise of unknown scale: gradient of a Student-t likelihood, leave-one-out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LeaveOneOut", "Spectrum", "leave_one_out", "student_gradient"]

_MAX_LEVERAGE = 0.9  # of a datum on its own prediction; more is rounding or interpolation
_LEAST_RIDGE = 1e-10  # relative to the largest eigenvalue
_ITERATIONS = 2  # of conjugate gradients, from means that are one step old


@dataclass(frozen=True)
class Spectrum:
    """Posteriors of several outputs that share a Gram matrix ``Λ = Q diag(ω) Qᵀ``.

    With the precision ``A_k = Λ + λ_k`` in units of the noise every output is diagonal in ``Q``:
    ``A_k⁻¹ = Q diag(1 / (ω + λ_k)) Qᵀ``, and the mean is ``m_k = A_k⁻¹ η_k``.

    Attributes:
        vectors: ``Q``, ``[G, D, D]``; of a basis that is kept, perhaps in less precision.
        inverse: ``1 / (ω + λ_k)``, ``[G, P, D]``, or ``[G, 1, D]`` where outputs share the ridge.
        mean: ``[G, P, D]``.
        values: ``ω``, the diagonal of ``QᵀΛQ``, ``[G, D]``.
    """

    vectors: Tensor
    inverse: Tensor
    mean: Tensor
    values: Tensor

    def first(self, outputs: int) -> Spectrum:
        """Of the first outputs alone."""
        if outputs == self.mean.shape[1]:
            return self
        inverse, mean = self.inverse[:, :outputs], self.mean[:, :outputs]
        return Spectrum(self.vectors, inverse, mean, self.values)

    def to(self, dtype: torch.dtype) -> Spectrum:
        """In another dtype."""
        if dtype == self.mean.dtype:
            return self
        vectors, inverse, mean = (p.to(dtype) for p in (self.vectors, self.inverse, self.mean))
        return Spectrum(vectors, inverse, mean, self.values)

    @staticmethod
    def of(gram: Tensor, shift: Tensor, ridge: Tensor) -> Spectrum:
        """Posteriors from evidence.

        Args:
            gram: ``Λ``, ``[G, D, D]``.
            shift: ``η``, ``[G, P, D]``.
            ridge: ``λ``, ``[G, P]``, or ``[G, 1]`` of all; one below 1e-10 of the largest
                eigenvalue is raised to it.
        """
        values, vectors = torch.linalg.eigh(gram)
        floor = (values[:, -1:] * _LEAST_RIDGE).clamp_min_(torch.finfo(gram.dtype).tiny)
        ridge = torch.maximum(ridge, floor)
        inverse = torch.add(values.clamp_min_(0.0)[:, None], ridge[..., None]).reciprocal_()
        if inverse.shape[1] < shift.shape[1]:  # one product with all outputs in place of two
            mean = torch.bmm(shift, torch.bmm(vectors * inverse, vectors.mT))
        else:
            mean = torch.bmm(torch.bmm(shift, vectors).mul_(inverse), vectors.mT)
        return Spectrum(vectors, inverse, mean, values)

    @staticmethod
    def near(
        gram: Tensor, shift: Tensor, ridge: Tensor, vectors: Tensor, values: Tensor, start: Tensor
    ) -> Spectrum:
        """Posteriors from evidence in a basis that nearly is its eigenbasis.

        Off the diagonal ``QᵀΛQ`` is neglected in variances. The means are those of the evidence:
        conjugate gradients, preconditioned by the diagonal, go from ``start`` towards them; every
        iteration shrinks the error, however old the basis.

        Args:
            gram: as in :meth:`of`; shift and ridge too.
            shift: likewise.
            ridge: likewise.
            vectors: ``Q`` of earlier evidence, ``[G, D, D]``; their precision is that of the
                preconditioner, not of the means.
            values: diagonal of ``QᵀΛQ``, ``[G, D]``.
            start: means of earlier evidence, ``[G, P, D]``.
        """
        tiny = torch.finfo(gram.dtype).tiny
        floor = (values.amax(1, keepdim=True) * _LEAST_RIDGE).clamp_min_(tiny)
        ridge = torch.maximum(ridge, floor)[..., None]
        inverse = torch.add(values[:, None], ridge).reciprocal_()
        back, light, dtype = vectors.mT, inverse.to(vectors.dtype), gram.dtype

        def precondition(x: Tensor) -> Tensor:
            return torch.bmm(torch.bmm(x.to(light.dtype), vectors).mul_(light), back).to(dtype)

        mean = start
        residual = shift - torch.baddbmm(ridge * mean, mean, gram)
        direction = precondition(residual)
        product = (residual * direction).sum(2, keepdim=True)
        for last in (False,) * (_ITERATIONS - 1) + (True,):
            image = torch.baddbmm(ridge * direction, direction, gram)
            step = product / (direction * image).sum(2, keepdim=True).clamp_min_(tiny)
            mean = torch.addcmul(mean, step, direction)
            if last:
                break
            residual = torch.addcmul(residual, step, image, value=-1)
            better = precondition(residual)
            old, product = product, (residual * better).sum(2, keepdim=True)
            direction = torch.addcmul(better, product / old.clamp_min(tiny), direction)
        return Spectrum(vectors, inverse, mean, values)


@dataclass(frozen=True)
class LeaveOneOut:
    """What the posterior without a datum says of that datum.

    Attributes:
        residual: ``r' = h̃ᵀm' - y``, ``[G, N, R]``.
        rest: ``1/κ = 1 - w h̃ᵀA⁻¹h̃``, ``[G, N, R]``.
        rotated: ``h̃ᵀQ``, ``[S, N, D]``.
    """

    residual: Tensor
    rest: Tensor
    rotated: Tensor


def leave_one_out(
    features: Tensor,
    targets: Tensor,
    posterior: Spectrum,
    weights: Tensor | None = None,
    rotated: Tensor | None = None,
    light: Spectrum | None = None,
) -> LeaveOneOut:
    """Prediction of every datum by the posterior without that datum.

    Taking datum i of weight w out is a rank-one change (Sherman-Morrison): with ``u = A⁻¹h̃``, the
    leverage ``ℓ = h̃ᵀu`` and ``r = h̃ᵀm - y``::

        κ = 1 / (1 - w ℓ)     r' = κ r     m' = m + w κ r u     u' = κ u     h̃ᵀA'⁻¹h̃ = κ ℓ

    Args:
        features: ``h̃``, ``[S, N, D]``; ``S`` is ``G`` or 1.
        targets: ``[G, N, R]``.
        posterior: whose first ``R`` outputs these are; each datum is in it with its weight.
        weights: ``[G, N, 1]``, or ``None`` where all are one.
        rotated: ``h̃ᵀQ``, ``[G, N, D]``, if it is known.
        light: the posterior in the dtype of the results; residuals, small differences of large
            numbers, are found in that of ``posterior``.

    Returns:
        leverages times weights are taken as 0.9 at most.
    """
    posterior = posterior.first(targets.shape[2])
    light = posterior if light is None else light.first(targets.shape[2])
    dtype = light.mean.dtype
    if len(features) < len(posterior.vectors):
        features = features.expand(len(posterior.vectors), -1, -1)
    if rotated is None:
        rotated = torch.bmm(features, posterior.vectors)
    rotated = rotated.to(dtype)
    square = rotated * rotated
    rest = torch.baddbmm(
        square.new_ones(1),
        square if weights is None else square * weights,
        light.inverse.mT,
        alpha=-1,
    ).clamp_min_(1 - _MAX_LEVERAGE)
    own = torch.baddbmm(targets, features, posterior.mean.mT, beta=-1).to(dtype)
    return LeaveOneOut(own.div_(rest), rest, rotated)


def student_gradient(
    left: LeaveOneOut,
    posterior: Spectrum,
    d: int,
    noise_variance: Tensor,
    factor: Tensor,
    degrees_of_freedom: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Expected gradient of a squared error, scaled as that of a Student-t likelihood.

    Under the posterior ``N(m', τ² A'⁻¹)`` without the datum the expected gradient of
    ``(h̃ᵀw - y)²`` is ``2 (τ² u' + m' r')``. The negative log-density of a Student-t variable of
    scale τ and ν degrees of freedom has the gradient of the squared error times
    ``ρ = (ν + 1) / 2 (ν τ² + e²)``; for ``e²`` its expectation ``r'² + τ² κ ℓ`` is taken, with
    ``w κ ℓ = κ - 1``. The gradient is in nats, whatever the unit of the label, and the influence of
    a datum is bounded. The sum over outputs is taken in the eigenbasis, where no ``[N, R, d]``
    tensor is needed.

    Args:
        left: of :func:`leave_one_out`.
        posterior: the same.
        d: features without the constant of a bias.
        noise_variance: τ², ``[G, R]``.
        factor: of the loss, ``[G, N or 1, R]``; 0 for a label that is missing.
        degrees_of_freedom: ν.
        weights: as in :func:`leave_one_out`; 0 for a label that is missing.

    Returns:
        the gradient summed over outputs, ``[G, N, d]``, and ρ, ``[G, N, R]``.
    """
    posterior = posterior.first(left.residual.shape[2])
    # In place where it can be: with many outputs the memory that is touched is the time.
    r, tau2, nu = left.residual, noise_variance[:, None], degrees_of_freedom
    unit = 2 / (nu + 1)
    scale = tau2 * unit
    rho = scale / left.rest
    if weights is None:
        rho = rho.addcmul_(r, r, value=unit).add_(scale, alpha=nu - 1).reciprocal_()
        scaled = rho * factor
        # As τ² κ + r'² is what ρ has below the line but for (ν - 1) τ².
        along, times = torch.addcmul(factor, scaled, scale, value=1 - nu), nu + 1
    else:
        square = (r * r).mul_(weights).add_(rho, alpha=1 / unit)
        least = torch.finfo(rho.dtype).eps ** 0.5  # κ - 1 of less is rounding
        rho = rho.sub_(scale).div_(weights.clamp_min(least)).addcmul_(r, r, value=unit)
        rho = rho.add_(scale, alpha=nu).reciprocal_()
        scaled = rho * factor
        along, times = square.mul_(scaled), 2.0
    uncertain = torch.bmm(along, posterior.inverse).mul_(left.rotated)
    plain = torch.bmm(scaled.mul_(r), posterior.mean)
    gradient = torch.baddbmm(plain, uncertain, posterior.vectors.mT, beta=2, alpha=times)
    return gradient.narrow(2, 0, d), rho

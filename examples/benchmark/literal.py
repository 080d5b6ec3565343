"""The paper's formulas as they are printed, to measure the closed forms against.

Dense d×d second moments per datum (Eq. 4), J samples of the weights with dense outer products
(Eq. 11), one joint covariance over all binary outputs with its Jacobian (Eq. 9 and 10), explicit
inverses, and Eq. 7 on the diagonal. The bias is a feature that is always one. Everything is
vectorised and runs as one or a few matrix products; only the data are cut into chunks, where the
samples of all of them would not fit in memory. Kept literal on purpose: do not optimise.

Shapes: B data, d features, D = d + 1, K outputs or C classes, P = K·D weights in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 29
"""Size of the largest tensor that is made at once."""

TINY_VARIANCE = 1e-12
"""Floor for E[g²] − E[g]², which rounding can make negative."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (…, P) and dense covariance (P, P)."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and variance (B, K, d) of the gradient of each task at each datum's features."""

    mean: Tensor
    variance: Tensor


def augment(h: Tensor) -> Tensor:
    """Features (B, d) with a column of ones for the bias (B, D)."""
    return torch.cat([h, h.new_ones(len(h), 1)], dim=1)


def regression_posterior(h: Tensor, y: Tensor, prior_inv: Tensor, prior_mean: Tensor) -> Gaussian:
    """Eq. 2 with τ = 1 for K outputs that share one covariance: mean (K, D), covariance (D, D).

    ``y`` is (B, K), ``prior_mean`` (K, D); ``prior_inv`` is the inverse of the prior covariance
    (D, D), which the caller inverts once an epoch.
    """
    x = augment(h)
    covariance = torch.linalg.inv(prior_inv + x.T @ x)
    return Gaussian((covariance @ (prior_inv @ prior_mean.T + x.T @ y)).T, covariance)


def regression_moments(h: Tensor, y: Tensor, posterior: Gaussian) -> Moments:
    """Eq. 4: E[g] and the dense E[g gᵀ] of every datum and output, then its diagonal."""
    x, (b, d) = augment(h), h.shape
    m, cov = posterior.mean, posterior.covariance
    outer = m.unsqueeze(2) * m.unsqueeze(1)
    plus, minus = cov + outer, cov - outer
    a = x.unsqueeze(2) * x.unsqueeze(1)

    mean = 2 * (x @ cov + m.unsqueeze(1) * (x @ m.T - y).T.unsqueeze(2))
    plus_h = plus @ x.T
    m_ht_plus = m[:, None, :, None] * plus_h.transpose(1, 2).unsqueeze(2)
    ht_m_minus = (m @ x.T)[:, :, None, None] * minus.unsqueeze(1)
    cubic = m_ht_plus + m_ht_plus.transpose(2, 3) + ht_m_minus

    aat_plus = ((a + a.transpose(1, 2)).reshape(1, -1, d + 1) @ plus).unflatten(1, (b, d + 1))
    quartic = plus.unsqueeze(1) @ aat_plus
    quartic += torch.einsum("bij,ji->b", a, cov)[:, None, None] * plus.unsqueeze(1)
    quartic += torch.einsum("ki,bij,kj->kb", m, a, m)[:, :, None, None] * minus.unsqueeze(1)

    label = y.T[:, :, None, None]
    second = 4 * (label**2 * plus.unsqueeze(1) - 2 * label * cubic + quartic)
    covariance = second - mean.unsqueeze(3) * mean.unsqueeze(2)
    variance = covariance.diagonal(dim1=2, dim2=3)
    return Moments(mean.transpose(0, 1)[..., :d], variance.transpose(0, 1)[..., :d])


def classification_posterior(
    h: Tensor, y: Tensor, weight: Tensor, prior_inv: Tensor, prior_mean: Tensor, softmax: bool
) -> Gaussian:
    """Eq. 9 with the generalised Gauss-Newton matrix of Eq. 10, one joint covariance (P, P).

    ``y`` is (B, K) binary labels or one-hot classes, ``weight`` ŵ (K, D), the prior mean (P,) and
    the inverse of its covariance (P, P).
    """
    x, outputs = augment(h), y.shape[1]
    f = x @ weight.T
    p = torch.softmax(f, 1) if softmax else torch.sigmoid(f)
    cross = p.unsqueeze(2) * p.unsqueeze(1) if softmax else torch.diag_embed(p * p)
    hessian = torch.diag_embed(p) - cross
    jacobian = torch.einsum("bd,oc->bocd", x, torch.eye(outputs, dtype=h.dtype)).flatten(2)
    ggn = jacobian.flatten(0, 1).T @ (hessian @ jacobian).flatten(0, 1)
    gradient = (p - y).flatten() @ jacobian.flatten(0, 1)
    a = gradient + prior_inv @ (weight.flatten() - prior_mean)
    covariance = torch.linalg.inv(ggn + prior_inv)
    return Gaussian(weight.flatten() - covariance @ a, covariance)


def classification_moments(
    h: Tensor, y: Tensor, posterior: Gaussian, samples: int, softmax: bool
) -> Moments:
    """Eq. 11 with ``samples`` joint draws of the weights of all outputs; classes are one task."""
    x, d, outputs = augment(h), h.shape[1], y.shape[1]
    w = _sample(posterior, samples).unflatten(1, (outputs, d + 1))
    f = torch.einsum("bd,jod->bjo", x, w)
    residual = (torch.softmax(f, 2) if softmax else torch.sigmoid(f)) - y.unsqueeze(1)
    tasks = 1 if softmax else outputs
    step = max(1, CHUNK_BYTES // (samples * tasks * d * h.element_size()))
    means, variances = [], []
    for r in residual.split(step):
        if softmax:
            g = torch.einsum("bjo,jod->bjd", r, w[..., :d]).unsqueeze(1)
        else:
            g = r.transpose(1, 2).unsqueeze(3) * w[..., :d].transpose(0, 1)
        mean = g.mean(2)
        second = g.transpose(2, 3) @ g / samples
        covariance = second - mean.unsqueeze(3) * mean.unsqueeze(2)
        means.append(mean)
        variances.append(covariance.diagonal(dim1=2, dim2=3).clone())
    return Moments(torch.cat(means), torch.cat(variances))


def _sample(posterior: Gaussian, samples: int) -> Tensor:
    """Draws (J, P) from the joint posterior."""
    mean, cov = posterior.mean.flatten(), posterior.covariance
    # An explicit inverse is symmetric up to rounding only.
    factor = torch.linalg.cholesky((cov + cov.T) / 2)
    return mean + torch.randn(samples, len(mean), dtype=mean.dtype) @ factor.T


def aggregate(moments: list[Moments], exponents: list[float]) -> Tensor:
    """Eq. 7 with (λ)^s, s per group of tasks: the update direction (B, d)."""
    pairs = zip(moments, exponents, strict=True)
    precision = torch.cat([(1 / m.variance.clamp_min(TINY_VARIANCE)) ** s for m, s in pairs], 1)
    mean = torch.cat([part.mean for part in moments], dim=1)
    return (precision * mean).sum(1) / precision.sum(1)

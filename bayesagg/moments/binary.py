"""Binary cross-entropy: moments by one-dimensional quadrature over the logit."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bayesagg.constants import kept
from bayesagg.moments.log_moments import LogMoments, variance_of
from bayesagg.moments.whitened import whitened
from bayesagg.posterior import Gaussian

__all__ = ["binary_log_moments", "binary_moments", "gaussian_nodes", "panel_nodes"]

# Gauss-Hermite nodes up to a standard deviation of the logit: relative error of all moments
# at most 1e-6 to 1e-5, in the tails of the sigmoid too (measured against 150 nodes).
_HERMITE = ((0.5, 8), (1.0, 16), (2.0, 32))
_PANEL_NODES, _PANELS = 16, 4  # beyond, panels are more accurate than Hermite nodes
_TRANSITION = 8.0  # the sigmoid is flat to 3e-4 outside ±8


@lru_cache
def hermite_rule(nodes: int) -> tuple[list[float], list[float]]:
    """Gauss-Hermite nodes and weights for a standard normal; the weights sum to one."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return x.tolist(), (w / w.sum()).tolist()


@lru_cache
def _legendre(nodes: int) -> tuple[list[float], list[float]]:
    x, w = np.polynomial.legendre.leggauss(nodes)
    return ((x + 1) / 2).tolist(), (w / 2).tolist()


@kept
def _constants(
    rule: Callable[[int], tuple[list[float], list[float]]],
    nodes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    x, w = (torch.tensor(value, dtype=dtype, device=device) for value in rule(nodes))
    return x, w


def gaussian_nodes(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for ``E[f(σ(z))]``, ``z ~ N(mean, sd²)``, at any scale.

    Narrow Gaussians get 8 to 32 Gauss-Hermite nodes, as many as the widest of them needs. Where
    one is wide, so that the sigmoid is a step that Hermite nodes straddle, all get four 16-node
    Gauss-Legendre panels that end where the step does, and reach far enough for the
    exponential tail of a saturated residual (``σ² ≈ e^{2z}``).

    Args:
        mean: logit means, any shape.
        sd: standard deviations, the same shape, non-negative.

    Returns:
        standardised nodes ``(z - mean) / sd``, of the shape of ``mean`` with the nodes appended,
        and weights that sum to about one, of the same shape or one that broadcasts to it.
    """
    widest = float(sd.amax()) if sd.numel() else 0.0
    for bound, count in _HERMITE:
        if widest <= bound:
            x, w = _constants(hermite_rule, count, mean.dtype, mean.device)
            return x.expand(*mean.shape, -1), w
    x, w = _constants(hermite_rule, _PANELS * _PANEL_NODES, mean.dtype, mean.device)
    wide = sd > _HERMITE[-1][0]
    nodes, weights = x.repeat(*mean.shape, 1), w.repeat(*mean.shape, 1)
    nodes[wide], weights[wide] = panel_nodes(mean[wide], sd[wide])
    return nodes, weights


def panel_nodes(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """The panels of :func:`gaussian_nodes` for all, however narrow: 64 nodes, no look at the data.

    Args:
        mean: as there.
        sd: as there, positive.
    """
    t, tw = _constants(_legendre, _PANEL_NODES, mean.dtype, mean.device)
    edges = _panel_edges(mean.flatten(), sd.flatten())
    length = edges.diff(dim=-1)[..., None]
    panel = (edges[:, :-1, None] + length * t).flatten(-2)
    density = torch.exp(-0.5 * panel.square()) / (2 * torch.pi) ** 0.5
    weights = (length * tw).flatten(-2) * density
    return panel.view(*mean.shape, -1), weights.view(*mean.shape, -1)


def _panel_edges(m: Tensor, s: Tensor) -> Tensor:
    """Standardised ends of the panels, ``[n, 5]``: the support, the transition, the longest cut."""
    low, high = m - 13 * s, m + 13 * s
    edge = torch.full_like(m, _TRANSITION)
    inner_low, inner_high = torch.clamp(-edge, low, high), torch.clamp(edge, low, high)
    low, high = torch.minimum(m - 6.5 * s, inner_low), torch.maximum(m + 6.5 * s, inner_high)
    edges = (torch.stack([low, inner_low, inner_high, high], -1) - m[:, None]) / s[:, None]
    longest = edges.diff(dim=-1).argmax(-1, keepdim=True)
    middle = (edges.gather(-1, longest) + edges.gather(-1, longest + 1)) / 2
    return torch.cat([edges, middle], dim=-1).sort(dim=-1).values


def binary_moments(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, full: bool = False
) -> tuple[Tensor, Tensor]:
    """Moments of ``g = (σ(z) - y) w``, ``z = h̃ᵀw``, for ``w ~ N(m, S)``.

    Given the standardised logit ``x = (z - m_z)/√v`` the weights are normal with mean
    ``m + ρ x``, ``ρ = S h̃/√v``, and variance ``S_dd - ρ²``, so five expectations over ``x`` give
    both moments. With ``e = σ(z) - y`` and ``Σ = Cov(e, e x)``::

        E[g]   = E[e] m + E[e x] ρ
        Var[g] = Σ_00 m² + 2 Σ_01 m ρ + Σ_11 ρ² + E[e²] (S_dd - ρ²)

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: probabilities ``[N, K]``.
        posterior: of ``K`` outputs over ``D`` weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    if full:
        return _covariances(features, targets, posterior, d)
    return variance_of(binary_log_moments(features, targets, posterior, d))


def binary_log_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    dtype: torch.dtype | None = None,
) -> LogMoments:
    """:func:`binary_moments` in ``dtype``, by default that of the posterior.

    The quadratic form is written as ``E[e²]`` times a sum of squares (``Σ`` is positive
    semi-definite), ``(root m + slope ρ)² + rest ρ² + (S_dd - ρ²)``, exact to rounding of ``S_dd``;
    ``v → 0`` needs no special case because ``|ρ| ≤ √S_dd``.
    """
    dtype = posterior.mean.dtype if dtype is None else dtype
    tiny = torch.finfo(dtype).tiny
    first, second, shape, rho, variance = _conditional(features, targets, posterior, d, dtype)
    c0, c1, root, slope, rest = (value.to(dtype) for value in (*first, *shape))
    m = posterior.mean[:, None, :d].to(dtype)
    mean = torch.addcmul(rho * c1, m, c0)
    along = torch.addcmul(rho * slope, m, root)
    relative = torch.addcmul(variance, rho.square_(), rest.sub_(1))
    relative = relative.addcmul_(along, along).clamp_(min=tiny)
    log_scale = second.clamp(min=torch.finfo(second.dtype).tiny).log_().to(dtype)
    return LogMoments(*(part.transpose(0, 1) for part in (mean, relative, log_scale)))


def _covariances(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int
) -> tuple[Tensor, Tensor]:
    m, s = posterior.mean[:, None, :d], posterior.covariance[:, None, :d, :d]
    (c0, c1), second, (root, slope, rest), rho, _ = _conditional(
        features, targets, posterior, d, m.dtype
    )
    along = torch.addcmul(rho * slope, m, root)
    outer = rho[..., :, None] * rho[..., None, :]
    cov = along[..., :, None] * along[..., None, :] + rest[..., None] * outer + (s - outer)
    mean = torch.addcmul(rho * c1, m, c0)
    return mean.transpose(0, 1), (second[..., None] * cov).transpose(0, 1)


def _conditional(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """``E[e], E[e x]``; ``E[e²]``; Cholesky of ``Σ / E[e²]``; ``ρ`` and ``S_dd`` in ``dtype``.

    The quadratic form is ``E[e²] ((root m + slope ρ)² + rest ρ² + S_dd - ρ²)``.
    """
    sd, rho, variance = whitened(features, posterior, d, dtype)
    z = (features @ posterior.mean.mT).mT[..., None]
    first, second, sigma = _residual_moments(z, sd.expand_as(z), targets.mT[..., None])
    tiny = torch.finfo(sd.dtype).tiny
    s00, s01, s11 = (value / second.clamp(min=tiny) for value in sigma)
    root = s00.sqrt()
    slope = s01 / root.clamp(min=tiny)
    rest = (s11 - slope.square()).clamp(min=0)
    return first, second, (root, slope, rest), rho, variance


def _residual_moments(
    z: Tensor, sd: Tensor, targets: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, tuple[Tensor, Tensor, Tensor]]:
    """``(E[e], E[e x])``, ``E[e²]`` and ``Σ_00, Σ_01, Σ_11``, of the shape of ``z``, ``[…, 1]``."""
    x, w = gaussian_nodes(z[..., 0], sd[..., 0])
    # σ(z) - y from the side of the label, where no digits are lost: s (σ(s z) - min(y, 1 - y)).
    side = torch.where(targets > 0.5, -1.0, 1.0).to(z.dtype)
    soft = torch.minimum(targets, 1 - targets)
    e = torch.sigmoid(torch.addcmul(z, sd, x).mul_(side)).sub_(soft).mul_(side)
    ex = e * x
    c0, c1, second = _mean(w, e), _mean(w, ex), _mean(w, e.square())
    e, ex = e.sub_(c0), ex.sub_(c1)
    sigma = _mean(w, e.square()), _mean(w, e * ex), _mean(w, ex.square())
    return (c0, c1), second, sigma


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Weighted sum over the nodes, which come last; that dimension is kept."""
    if weights.dim() == 1:
        return values @ weights[:, None]
    return (weights * values).sum(-1, keepdim=True)

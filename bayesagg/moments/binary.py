"""Binary cross-entropy: moments by one-dimensional quadrature over the logit."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from bayesagg.posterior import Gaussian

__all__ = ["binary_moments", "gaussian_nodes"]

_NARROW_NODES = 32
_PANEL_NODES, _PANELS = 16, 4
_WIDE = 2.0  # logit standard deviation from which the panels are more accurate than Hermite nodes
_NARROW = 1.0  # logit standard deviation up to which 32 Hermite nodes are as good as 64
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


@lru_cache
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    values = (
        *hermite_rule(_NARROW_NODES),
        *hermite_rule(_PANELS * _PANEL_NODES),
        *_legendre(_PANEL_NODES),
    )
    return tuple(torch.tensor(value, dtype=dtype, device=device) for value in values)


def gaussian_nodes(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for ``E[f(σ(z))]``, ``z ~ N(mean, sd²)``, at any scale.

    Narrow Gaussians get 64 Gauss-Hermite nodes. Wide ones, on which the sigmoid is a step that
    Hermite nodes straddle, get four 16-node Gauss-Legendre panels that end where it does, and
    reach far enough for the exponential tail of a saturated residual (``σ² ≈ e^{2z}``).

    Args:
        mean: logit means, any shape.
        sd: standard deviations, the same shape, non-negative.

    Returns:
        standardised nodes ``(z - mean) / sd`` and weights that sum to about one, both of the
        shape of ``mean`` with 64 nodes appended; 32 where every Gaussian is
        narrow.
    """
    few, few_weights, x, w, t, tw = _constants(mean.dtype, mean.device)
    wide = sd > _WIDE
    if not bool((sd > _NARROW).any()):
        return few.expand(*mean.shape, -1), few_weights.expand(*mean.shape, -1)
    nodes, weights = x.expand(*mean.shape, -1), w.expand(*mean.shape, -1)
    edges = _panel_edges(mean[wide], sd[wide])
    length = edges.diff(dim=-1)[..., None]
    panel = (edges[:, :-1, None] + length * t).flatten(-2)
    density = torch.exp(-0.5 * panel.square()) / (2 * torch.pi) ** 0.5
    nodes, weights = nodes.clone(), weights.clone()
    nodes[wide], weights[wide] = panel, (length * tw).flatten(-2) * density
    return nodes, weights


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

    The quadratic form is written as a sum of squares (``Σ`` is positive semi-definite): nothing
    cancels, and ``v → 0`` needs no special case because ``|ρ| ≤ √S_dd``.

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: probabilities, ``[N, K]``.
        posterior: of ``K`` outputs over ``D`` weights.
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.

    Returns:
        ``E[g]``, ``[N, K, d]``, and ``Var[g]``, ``[N, K, d]``, or ``Cov[g]``, ``[N, K, d, d]``.
    """
    white = features @ posterior.whitener.mT  # [K, N, D]
    sd = white.square().sum(-1).sqrt().mT  # [N, K]
    rho = (white @ posterior.whitener[..., :d]).transpose(0, 1)
    rho = rho / sd.clamp(min=torch.finfo(sd.dtype).tiny)[..., None]
    m = posterior.mean[:, :d]

    z = features @ posterior.mean.mT
    x, w = gaussian_nodes(z, sd)
    # σ(z) - y from the side of the label, where no digits are lost: s (σ(s z) - min(y, 1 - y)).
    side = torch.where(targets > 0.5, -1.0, 1.0).to(z.dtype)[..., None]
    soft = torch.minimum(targets, 1 - targets)[..., None]
    e = torch.sigmoid(torch.addcmul(z[..., None], sd[..., None], x).mul_(side))
    e = e.sub_(soft).mul_(side)
    ex = e * x
    c0, c1 = (w * e).sum(-1), (w * ex).sum(-1)
    second = (w * e.square()).sum(-1)
    e, ex = e.sub_(c0[..., None]), ex.sub_(c1[..., None])
    we = w * e
    s00, s01 = (we * e).sum(-1), (we * ex).sum(-1)
    s11 = (w * ex.square()).sum(-1)
    # Cholesky of Σ: Σ_00 (m + ratio ρ)² + rest ρ²
    ratio = s01 / s00.clamp(min=torch.finfo(s00.dtype).tiny)
    rest = (s11 - ratio * s01).clamp(min=0)

    mean = torch.addcmul(c0[..., None] * m, c1[..., None], rho)
    along = torch.addcmul(m, ratio[..., None], rho)
    if full:
        s = posterior.covariance[:, :d, :d]
        outer = rho[..., :, None] * rho[..., None, :]
        cov = s00[..., None, None] * (along[..., :, None] * along[..., None, :])
        cov = cov + rest[..., None, None] * outer
        return mean, cov + second[..., None, None] * (s - outer)
    rho2 = rho.square_()
    remaining = (posterior.variance[:, :d] - rho2).clamp_(min=0)
    variance = along.square_().mul_(s00[..., None])
    variance.addcmul_(rest[..., None], rho2).addcmul_(second[..., None], remaining)
    return mean, variance

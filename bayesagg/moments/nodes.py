"""Nodes and weights of all quadratures and cubatures, mostly of normal distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesagg.constants import kept

__all__ = [
    "gaussian_nodes",
    "legendre_nodes",
    "panel_nodes",
    "sobol_nodes",
    "standard_normal_nodes",
]

# Gauss-Hermite nodes up to a standard deviation of the logit: relative error of all moments
# at most 1e-6 to 1e-5, in the tails of the sigmoid too (measured against 150 nodes).
_HERMITE = ((0.5, 8), (1.0, 16), (2.0, 32))
_PANEL_NODES, _PANELS = 16, 4  # beyond, panels are more accurate than Hermite nodes
_TRANSITION = 8.0  # the sigmoid is flat to 3e-4 outside ±8


@kept
def _hermite_nodes(
    count: int, dtype: torch.dtype, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite, for a standard normal; the weights sum to one."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    return _tensors(x, w / w.sum(), dtype, device)


@kept
def legendre_nodes(
    count: int, dtype: torch.dtype, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre, from 0 to 1."""
    x, w = np.polynomial.legendre.leggauss(count)
    return _tensors((x + 1) / 2, w / 2, dtype, device)


def _tensors(
    x: Any, w: Any, dtype: torch.dtype, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.tensor(v.tolist(), dtype=dtype, device=device) for v in (x, w))
    return nodes, weights


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
            x, w = _hermite_nodes(count, mean.dtype, mean.device)
            return x.expand(*mean.shape, -1), w
    x, w = _hermite_nodes(_PANELS * _PANEL_NODES, mean.dtype, mean.device)
    wide = sd > _HERMITE[-1][0]
    nodes, weights = x.repeat(*mean.shape, 1), w.repeat(*mean.shape, 1)
    nodes[wide], weights[wide] = panel_nodes(mean[wide], sd[wide])
    return nodes, weights


def panel_nodes(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor]:
    """The panels of :func:`gaussian_nodes` for all, however narrow; no look at the data."""
    t, tw = legendre_nodes(_PANEL_NODES, mean.dtype, mean.device)
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


def _symmetric_sobol(dimensions: int, count: int, reach: float = 0.0) -> Tensor:
    """Scrambled Sobol points under the normal quantile function and their negatives, ``[E, J]``."""
    engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0)
    uniform = engine.draw(count // 2, dtype=torch.float64).clamp_(reach, 1 - reach)
    half = torch.special.ndtri(uniform).mT
    return torch.cat([half, -half], dim=1)


@kept
def sobol_nodes(dimensions: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Points of equal weight in many dimensions, where there are too few to be whitened."""
    return _symmetric_sobol(dimensions, count, 1e-9).to(device, dtype).contiguous()


@kept
def standard_normal_nodes(
    dimensions: int, count: int, sobol: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cubature for a standard normal: nodes ``[E, J]`` and weights ``[1, J]`` that sum to one.

    A product of Gauss-Hermite rules of so many nodes each; or so many Sobol points, whitened so
    that their mean, odd moments and covariance are exact.
    """
    if sobol:
        nodes = _symmetric_sobol(dimensions, count)
        factor = torch.linalg.cholesky(nodes @ nodes.mT / nodes.shape[1])
        nodes = torch.linalg.solve_triangular(factor, nodes, upper=False)
        weights = torch.full((1, nodes.shape[1]), 1 / nodes.shape[1], dtype=torch.float64)
    else:
        x, w = _hermite_nodes(count, torch.float64, None)
        nodes = torch.cartesian_prod(*([x] * dimensions)).view(-1, dimensions).mT
        weights = torch.cartesian_prod(*([w] * dimensions)).view(1, -1, dimensions).prod(-1)
    return nodes.to(device, dtype).contiguous(), weights.to(device, dtype)

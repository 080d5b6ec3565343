"""Student-t and normal distributions: what torch leaves out of them.

``F(t) = 1/2 + c ∫₀^{atan(t/√ν)} cos^{ν-1} θ dθ``: over that range the integrand is smooth for
every ν, and 64 Gauss-Legendre nodes give all digits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import StudentT
from torch.nn import functional as F

from bayesagg.moments.nodes import legendre_nodes

__all__ = [
    "NORMAL",
    "half_widths",
    "interpolated",
    "student_cdf",
    "student_density",
    "student_quantile",
]

NORMAL = 1e7  # degrees of freedom from which a Student-t distribution is taken for a normal one
LEVELS = 200  # of intervals, evenly spaced, between which half-widths are interpolated


def student_density(t: Tensor, dof: Tensor) -> Tensor:
    """Density at ``t`` of a standard Student-t variable; the normal one where ν is very large."""
    nu = dof.double().clamp_max(NORMAL)
    student = StudentT(nu, validate_args=False).log_prob(t).exp().to(t.dtype)
    normal = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    return torch.where(dof < NORMAL, student, normal)


def student_cdf(t: Tensor, dof: Tensor) -> Tensor:
    """Probability of a value below ``t``, likewise."""
    x, w = legendre_nodes(64, torch.float64, t.device)
    nu = dof.double().clamp_max(NORMAL)[..., None]
    # Beyond 12 the tail of nearly normal ones is below 1e-12, and the nodes would be too coarse.
    reach = torch.where(nu < 30, torch.inf, 12.0)
    end = torch.atan(t.double()[..., None].clamp(-reach, reach) / nu.sqrt())
    log = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * math.log(math.pi)
    values = torch.exp(log + (nu - 1) * torch.cos(end * x).log())
    student = (0.5 + (end * (values * w).sum(-1, keepdim=True))[..., 0]).to(t.dtype)
    return torch.where(dof < NORMAL, student, torch.special.ndtr(t))


def student_quantile(probability: float | Tensor, dof: Tensor) -> Tensor:
    """Value that a standard Student-t variable is below with some probability, by bisection.

    Of the shape and dtype of ``dof``, ν; the probability is a number, or of that shape.
    """
    nu = dof.double()
    root = nu.clamp_max(NORMAL).sqrt()
    # Of the angle, where the whole line is a bounded interval.
    low = torch.full_like(nu, -math.pi / 2)
    high = -low
    for _ in range(60):
        middle = (low + high) / 2
        below = student_cdf(root * torch.tan(middle), nu) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (root * torch.tan((low + high) / 2)).to(dof.dtype)


def half_widths(residuals: Tensor, dof: float) -> Tensor:
    """Half-widths of central intervals that hold their share of the residuals, ``[LEVELS - 1]``.

    Of split conformal prediction (Lei et al. 2018): an interval of level p reaches to the
    ``p (n + 1)``-th smallest of n absolute residuals, so that it holds the next one with a
    probability within ``1 / (n + 1)`` of p, whatever their distribution. Levels ``1 / LEVELS,
    2 / LEVELS, …``; beyond the largest residual, above ``n / (n + 1)``, they grow as those of a
    Student-t variable, and without any they are those of it. Units are those of the residuals.
    """
    n, levels = len(residuals), torch.arange(1, LEVELS, dtype=residuals.dtype) / LEVELS
    levels = levels.to(residuals.device)
    ordered = torch.cat([residuals.new_zeros(1), residuals.abs().sort().values])
    rank = (levels * (n + 1)).clamp(max=n)
    below = rank.long().clamp(max=max(n - 1, 0))
    known = torch.lerp(ordered[below], ordered[(below + 1).clamp(max=n)], rank - below)
    nu = residuals.new_tensor(dof)
    tails = student_quantile((1 + levels) / 2, nu.expand(levels.shape))
    if n == 0:
        return tails
    return known * (tails / student_quantile(0.5 + 0.5 * n / (n + 1), nu)).clamp(min=1)


def interpolated(halves: Tensor, level: float, dof: Tensor) -> Tensor:
    """Half-widths of intervals of any level, ``[o]``, from those of :func:`half_widths`."""
    place = level * LEVELS
    if place >= LEVELS - 1:
        last = student_quantile(1 - 0.5 / LEVELS, dof)
        return halves[:, -1] * student_quantile((1 + level) / 2, dof) / last
    whole = F.pad(halves, (1, 0))
    return torch.lerp(whole[:, int(place)], whole[:, int(place) + 1], place - int(place))

"""Student-t and normal distributions: what torch leaves out of them.

``F(t) = 1/2 + c ∫₀^{atan(t/√ν)} cos^{ν-1} θ dθ``: over that range the integrand is smooth for
every ν, and 64 Gauss-Legendre nodes give all digits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import StudentT

__all__ = ["NORMAL", "student_cdf", "student_density", "student_quantile"]

NORMAL = 1e7  # degrees of freedom from which a Student-t distribution is taken for a normal one
_X, _W = np.polynomial.legendre.leggauss(64)


def student_density(t: Tensor, dof: Tensor) -> Tensor:
    """Density of a standard Student-t variable; the normal one where ν is very large.

    Args:
        t: of any shape.
        dof: ν, positive, of a shape that broadcasts with it.
    """
    nu = dof.double().clamp_max(NORMAL)
    student = StudentT(nu, validate_args=False).log_prob(t).exp().to(t.dtype)
    normal = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    return torch.where(dof < NORMAL, student, normal)


def student_cdf(t: Tensor, dof: Tensor) -> Tensor:
    """Probability of a value below ``t``; arguments as of :func:`student_density`."""
    x = torch.as_tensor((_X + 1) / 2, device=t.device)
    w = torch.as_tensor(_W / 2, device=t.device)
    nu = dof.double().clamp_max(NORMAL)[..., None]
    # Beyond 12 the tail of nearly normal ones is below 1e-12, and the nodes would be too coarse.
    reach = torch.where(nu < 30, torch.inf, 12.0)
    end = torch.atan(t.double()[..., None].clamp(-reach, reach) / nu.sqrt())
    log = torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2) - 0.5 * math.log(math.pi)
    values = torch.exp(log + (nu - 1) * torch.cos(end * x).log())
    student = (0.5 + (end * (values * w).sum(-1, keepdim=True))[..., 0]).to(t.dtype)
    return torch.where(dof < NORMAL, student, torch.special.ndtr(t))


def student_quantile(probability: float, dof: Tensor) -> Tensor:
    """Value that a standard Student-t variable is below with some probability, by bisection.

    Args:
        probability: between 0 and 1.
        dof: ν, of any shape.

    Returns:
        of the shape and dtype of ``dof``.
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

"""Losses beside their targets: the weight of every datum, if the loss is the head's likelihood.

A loss is the likelihood of the targets if its first derivatives are ``f (derivative for factor
one)`` and its second derivatives ``f (second derivatives for factor one)``, with one positive ``f``
per datum and task. One formula for all likelihoods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.reading.likelihood import Likelihood
from bayesagg.reading.observed import Found, Observed, Read, tolerance, value_tolerance

__all__ = ["fit", "fit_constant", "fit_partial", "points_away"]


def fit_constant(likelihood: Likelihood, observed: Observed, factor: Tensor) -> Read:
    """For a loss of known form and factor, every label of which is there.

    Args:
        likelihood: of the heads.
        observed: with targets.
        factor: ``[1, K]``.
    """
    z, y, eps = observed.output, observed.target, observed.eps
    assert y is not None
    expected = factor * likelihood.residual(z, y)
    off = likelihood.size(observed.gradient - expected)
    off = torch.sub(off, likelihood.size(expected), alpha=tolerance(eps))
    return Read(y, factor, None, ((off <= factor * likelihood.noise(z, eps)).all(0),))


def fit_partial(likelihood: Likelihood, observed: Observed, weighted: bool) -> Read:
    """For a loss of known form, whose labels may be missing.

    Args:
        likelihood: of the heads.
        observed: with targets.
        weighted: the factors differ between data.
    """
    z, g, y, present = _given(observed)
    tol = tolerance(observed.eps)
    r, noise = likelihood.residual(z, y), likelihood.noise(z, observed.eps)
    # Data whose loss vanishes although they have targets are masked.
    present = present & ~((likelihood.size(g) == 0) & (likelihood.size(r) > noise))
    r, noise = r * present, noise * present
    along, length = likelihood.against(g, r)
    factor = along.sum(0, keepdim=True) / length.sum(0, keepdim=True)
    factor = torch.where(present.any(0), factor, 1 / len(present))
    if weighted:
        clear = likelihood.size(r) > noise * (8 / tol)
        factor = torch.where(clear, along / torch.where(clear, length, 1), factor)
    off = likelihood.size(g - factor * r)
    holds = (off <= factor * (tol * likelihood.size(r) + noise)) & (factor > 0)
    value = (factor * likelihood.value(z, y) * present).sum(0)
    rounding = (factor * likelihood.value_noise(z, observed.eps)).sum(0)
    agrees = observed.agrees(value, value_tolerance(observed.eps), rounding)
    return Read(y, factor, present, (holds.all(0), agrees))


def fit(likelihood: Likelihood, observed: Observed) -> Found:
    """For a loss that is not known: first and second derivatives.

    Where there are no second derivatives (a compiled loss), the factor must be constant and the
    loss must have the value of its targets.
    """
    z, g, y, present = _given(observed)
    tol, eps = tolerance(observed.eps), observed.eps
    r, noise = likelihood.residual(z, y), likelihood.noise(z, eps)
    rough = likelihood.curvature_noise(z, eps)
    size_r, size_g = likelihood.size(r), likelihood.size(g)
    silent, shown = size_g == 0, size_r > noise
    clear = size_r > noise * (8 / tol)
    along, length = likelihood.against(g, r)
    factor = along / torch.where(clear, length, 1)
    curves = [(curved, likelihood.curved(z, v)) for v, curved in observed.probes]
    if curves:
        found, expected = curves[0]
        size = likelihood.size(expected)
        along, length = likelihood.against(found, expected)
        bent = size > rough * (8 / tol)
        factor = torch.where(bent, along / torch.where(bent, length, 1), factor)
        clear, shown = clear | bent, shown | (size > rough)
        silent = silent & (likelihood.size(found) == 0)
    here = present & ~(silent & shown)
    clear = clear & here
    typical = (factor * clear).sum(0, keepdim=True) / clear.sum(0, keepdim=True)
    typical = torch.where(clear.any(0), typical, 1 / len(clear))
    factor = torch.where(clear, factor, typical)
    holds = (factor > 0) & (likelihood.size(g - factor * r) <= factor * (tol * size_r + noise))
    quiet = size_g == 0
    for found, expected in curves:
        bound = factor * (tol * likelihood.size(expected) + rough)
        holds = holds & (likelihood.size(found - factor * expected) <= bound)
        quiet = quiet & (likelihood.size(found) == 0)
    holds = torch.where(here, holds, quiet)
    constant = ((factor - typical).abs() <= 2 * tol * typical).all(0)
    weighted = ~observed.all_of_head(constant)
    valid = observed.all_of_head(holds.all(0))
    if not curves:
        value = (factor * likelihood.value(z, y) * here).sum(0)
        rounding = (factor * likelihood.value_noise(z, eps)).sum(0)
        agrees = observed.agrees(value, value_tolerance(eps), rounding)
        valid = valid & ~weighted & agrees
    return Found(y, torch.where(constant, typical, factor), here, valid, weighted)


def _given(observed: Observed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert observed.target is not None and observed.present is not None
    return observed.output, observed.gradient, observed.target, observed.present


def points_away(likelihood: Likelihood, observed: Observed) -> bool:
    """Whether the loss, as a whole, clearly grows towards its targets; looks at the device."""
    z, g, y, present = _given(observed)
    r = likelihood.residual(z, y) * present
    g = g * present
    largest = g.abs().amax() * r.abs().amax()
    if float(largest) == 0:
        return False
    r, g = r / r.abs().amax(), g / g.abs().amax()
    return bool((g * r).sum() < -0.2 * g.norm() * r.norm())

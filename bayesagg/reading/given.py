"""Losses beside their targets: the weight of every datum, if the loss is the head's likelihood.

A loss is the likelihood of the targets if its first derivatives are ``f (derivative for factor
one)`` and its second derivatives ``f (second derivatives for factor one)``, with one positive ``f``
per datum and task. One formula for all likelihoods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    pair = _Pair(g, r * present, noise * present)
    factor = cover = _typical(likelihood, [pair], present)
    if weighted:
        factor, cover = _single(likelihood, [pair], present, factor)
    holds = pair.holds(likelihood, factor, cover, tol) & (factor > 0)
    agrees = _agrees(likelihood, observed, factor, present)
    return Read(y, factor, present, (holds.all(0), agrees))


def fit(likelihood: Likelihood, observed: Observed) -> Found:
    """For a loss that is not known: first and second derivatives.

    Where there are no second derivatives (a compiled loss), the factor must be constant and the
    loss must have the value of its targets.
    """
    z, g, y, present = _given(observed)
    tol, eps = tolerance(observed.eps), observed.eps
    rough = likelihood.curvature_noise(z, eps)
    pairs = [_Pair(g, likelihood.residual(z, y), likelihood.noise(z, eps))]
    pairs += [_Pair(curved, likelihood.curved(z, v), rough) for v, curved in observed.probes]
    quiet = torch.stack([likelihood.size(pair.found) == 0 for pair in pairs]).all(0)
    shown = torch.stack([likelihood.size(pair.unit) > pair.noise for pair in pairs]).any(0)
    here = present & ~(quiet & shown)
    typical = _typical(likelihood, pairs, here)
    factor, cover = _single(likelihood, pairs[:2], here, typical)
    alike, each = typical > 0, factor > 0
    for pair in pairs:
        alike = alike & pair.holds(likelihood, typical, typical, tol)
        each = each & pair.holds(likelihood, factor, cover, tol)
    constant = torch.where(here, alike, quiet).all(0)
    valid = constant | torch.where(here, each, quiet).all(0)
    if len(pairs) == 1:
        valid = constant
    valid, weighted = observed.all_of_head(valid), ~observed.all_of_head(constant)
    factor = torch.where(constant, typical, factor)
    if len(pairs) == 1:
        valid = valid & _agrees(likelihood, observed, factor, here)
    return Found(y, factor, here, valid, weighted)


@dataclass(frozen=True)
class _Pair:
    """Something that was found, what it is for a factor of one, and the rounding of that."""

    found: Tensor
    unit: Tensor
    noise: Tensor | float

    def holds(self, likelihood: Likelihood, factor: Tensor, cover: Tensor, tol: float) -> Tensor:
        """Whether it is what a factor makes of it, ``[N, K]``.

        Args:
            likelihood: of the heads.
            factor: ``[N, K]`` or ``[1, K]``.
            cover: the factor, or, where it is not to be seen, the largest that it may be.
            tol: relative error.
        """
        off = likelihood.size(self.found - factor * self.unit)
        return off <= tol * factor * likelihood.size(self.unit) + cover * self.noise


def _typical(likelihood: Likelihood, pairs: Sequence[_Pair], here: Tensor) -> Tensor:
    """The factor that is closest to all data, ``[1, K]``."""
    both = [likelihood.against(pair.found, pair.unit) for pair in pairs]
    along = torch.stack([along * here for along, _ in both]).sum((0, 1))
    length = torch.stack([length * here for _, length in both]).sum((0, 1))
    return torch.where(length > 0, along / length, 1 / len(here))[None]


def _single(
    likelihood: Likelihood, pairs: Sequence[_Pair], here: Tensor, typical: Tensor
) -> tuple[Tensor, Tensor]:
    """The factor of every datum, by what shows it best, and what it is at most, ``[N, K]``."""
    factor, clarity = typical.expand(here.shape), torch.full_like(typical, 2).expand(here.shape)
    for pair in pairs:
        along, length = likelihood.against(pair.found, pair.unit)
        here_clear = likelihood.size(pair.unit) / (pair.noise + torch.finfo(typical.dtype).tiny)
        better = here & (here_clear > clarity)
        factor = torch.where(better, along / torch.where(better, length, 1), factor)
        clarity = torch.where(better, here_clear, clarity)
    clear = clarity > 2
    return factor, torch.where(clear, factor, (factor * here).amax(0, keepdim=True))


def _agrees(likelihood: Likelihood, observed: Observed, factor: Tensor, here: Tensor) -> Tensor:
    """Whether losses have the values of their targets, ``[H]``."""
    z, _, y, _ = _given(observed)
    value = (factor * likelihood.value(z, y) * here).sum(0)
    rounding = (factor * likelihood.value_noise(z, observed.eps)).sum(0)
    return observed.agrees(value, value_tolerance(observed.eps), rounding)


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

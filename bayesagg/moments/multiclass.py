"""Cross-entropy over C classes: moments by cubature over C - 1 logit contrasts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from bayesagg.moments.common import LogMoments, variance_of
from bayesagg.moments.nodes import gaussian_nodes, standard_normal_nodes
from bayesagg.posterior import Gaussian, contrast_basis

__all__ = ["multiclass_log_moments", "multiclass_moments"]

# Mean variance of the logit contrasts up to which a Hermite product rule is used, and its nodes
# per dimension: the accurate rule, and the one for many contrasts or few nodes. Relative error of
# Var[g] about 1e-4 and 1e-3. Wider logits (in effect steps) are left to Sobol points.
_PRODUCT_RULES = ((0.05, (4, 3)), (0.25, (6, 4)), (1.0, (12, 6)))
_BOUNDS = [bound for bound, _ in _PRODUCT_RULES]
_MAX_NODES = 8192
_CHUNK = 1 << 20  # elements of the largest intermediate


def multiclass_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    full: bool = False,
    *,
    max_nodes: int = _MAX_NODES,
) -> tuple[Tensor, Tensor]:
    """Moments of ``g = Wᵀ(p(z) - y)``, ``z = W h̃``, for one task.

    In contrasts (:func:`bayesagg.posterior.contrast_basis`) ``g = Bᵀρ`` with ``B = QW`` and
    ``ρ = Q(p - y)``. The contrasts of the logits are ``t = m_t + L ε``, ``LLᵀ = Cov(t) = V``, and
    given ε every column of ``B`` is normal with mean ``m_d + R_d ε``, ``R_d = Cov(B_d, t) L^{-T}``,
    and covariance ``S_d - R_d R_dᵀ``. With ``φ = [ρ, ε ⊗ ρ]``, ``b_d = [m_d, vec R_d]``::

        E[g]_d   = b_dᵀ E[φ]
        Var[g]_d = b_dᵀ Cov(φ) b_d + tr((S_d - R_d R_dᵀ) E[ρρᵀ])

    so only moments of ``φ``, ``E(E+1)`` numbers per datum, are integrated.

    Args:
        features: ``h̃`` with the constant of the bias, ``[N, D]``.
        targets: probabilities, ``[N, C]``.
        posterior: of one task over ``E·D`` contrast weights (``K = G = 1``).
        d: number of shared dimensions; ``D`` or, with a bias, ``D - 1``.
        full: return the covariance instead of its diagonal.
        max_nodes: of the cubature, at least 64. Narrow logits need far fewer. With the default
            the error is that of about 10⁶ samples; with 256 nodes it is below that of J = 1024.

    Returns:
        ``E[g]``, ``[N, d]``, and ``Var[g]``, ``[N, d]``, or ``Cov[g]``, ``[N, d, d]``.
    """
    if full:
        return _covariances(features, targets, posterior, d, max_nodes)
    return variance_of(multiclass_log_moments(features, targets, posterior, d, max_nodes=max_nodes))


def multiclass_log_moments(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    *,
    max_nodes: int = _MAX_NODES,
    dtype: torch.dtype | None = None,
) -> LogMoments:
    """:func:`multiclass_moments` in ``dtype``, by default that of the posterior.

    Returns:
        of one task, ``[N, d]``, ``[N, d]`` and ``[N, 1]``.
    """
    dtype = posterior.mean.dtype if dtype is None else dtype
    e, width = targets.shape[1] - 1, features.shape[1]
    covariance = _of_contrasts(posterior, e, width)
    blocks = covariance.diagonal(dim1=1, dim2=3)[..., :d].flatten(0, 1).to(dtype)  # S_d, [E·E, d]
    parts, each = [], max(e * width, (e + 1) * d)
    for mean, b, r, phi, rho2, level, unit in _parts(
        features, targets, posterior, d, dtype, each, max_nodes
    ):
        rest = rho2.flatten(1) @ blocks
        rest = rest.sub_((rho2[:, None] @ r).mul_(r).sum((1, 2))).clamp_(min=0)
        rest = rest.add_((phi @ b).mul_(b).sum(1)).clamp_(min=torch.finfo(dtype).tiny)
        parts.append((mean, rest, level.log_() + 2 * unit.log()))
    return LogMoments(*map(torch.cat, zip(*parts, strict=True)))


def _covariances(
    features: Tensor, targets: Tensor, posterior: Gaussian, d: int, max_nodes: int
) -> tuple[Tensor, Tensor]:
    e, width = targets.shape[1] - 1, features.shape[1]
    s = _of_contrasts(posterior, e, width)[:, :d, :, :d]
    parts, each = [], d * max(e + 1, d)
    for mean, b, r, phi, rho2, level, unit in _parts(
        features, targets, posterior, d, features.dtype, each, max_nodes
    ):
        rest = torch.einsum("nab,aibj->nij", rho2, s)
        rest = rest - torch.einsum("nexi,nxy,neyj->nij", r, rho2, r)
        parts.append((mean, (level * unit.square())[..., None] * (b.mT @ phi @ b + rest)))
    mean, covariance = map(torch.cat, zip(*parts, strict=True))
    return mean, covariance


def _of_contrasts(posterior: Gaussian, e: int, width: int) -> Tensor:
    """Covariance, ``[E, D, E, D]``."""
    return posterior.covariance[0].view(e, width, e, width)


def _parts(
    features: Tensor,
    targets: Tensor,
    posterior: Gaussian,
    d: int,
    dtype: torch.dtype,
    each: int,
    max_nodes: int,
) -> Iterator[tuple[Tensor, ...]]:
    """Of some data at a time, whose largest intermediate has ``E · each`` elements a datum.

    Yields:
        ``E[g]``, ``[n, d]``; ``b``, ``[n, F, d]``, and ``R`` in it, ``[n, E, E, d]``; ``Cov(φ)``,
        ``[n, F, F]``, and ``E[ρρᵀ]``, ``[n, E, E]``, over ``E[ρᵀρ]``, so that they are of order
        one; that, positive, ``[n, 1]``; and the unit of ρ, ``[n, 1]``.
    """
    e, width = targets.shape[1] - 1, features.shape[1]
    weights, covariance = posterior.mean[0].view(e, width), _of_contrasts(posterior, e, width)
    constant = weights[:, :d].to(dtype)
    size = max(1, _CHUNK // (e * each))
    for h, y in zip(features.split(size), targets.split(size), strict=True):
        factor, r = _scores(h, covariance, d, dtype)  # r: [n, ε, contrast, d]
        b = torch.cat([constant.expand(len(h), e, d), r.flatten(1, 2)], dim=1)
        known = ((h @ weights.mT).to(dtype), factor.to(dtype), y.to(dtype))
        phi_mean, phi, rho2, unit = _integrals(*known, max_nodes)
        level = rho2.diagonal(dim1=1, dim2=2).sum(1)[:, None]
        level = level.clamp_(min=torch.finfo(level.dtype).tiny)
        mean = ((phi_mean * unit)[:, None] @ b)[:, 0]
        yield mean, b, r, phi.div_(level[..., None]), rho2.div_(level[..., None]), level, unit


def _scores(h: Tensor, covariance: Tensor, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``L`` with ``LLᵀ = V``, ``[n, E, E]``, and the weights' covariances with ε: ``L⁻¹ U``.

    ``covariance`` is ``[E, D, E, D]``, the second result ``[n, E, E, d]`` in ``dtype``.
    """
    e, width = covariance.shape[:2]
    u = torch.matmul(h, covariance.reshape(e, width, e * width)).transpose(0, 1)  # [n, E, E·D]
    factor = _factor((u.unflatten(2, (e, width)) @ h[:, None, :, None])[..., 0])
    identity = torch.eye(e, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return factor, (inverse @ u).unflatten(2, (e, width))[..., :d].to(dtype)


def _factor(v: Tensor) -> Tensor:
    """Cholesky factor of ``V`` that survives ``V → 0`` and rank deficiency, ``[n, E, E]``."""
    eps = torch.finfo(v.dtype).eps
    ridge = v.diagonal(dim1=-2, dim2=-1).sum(-1) * (8 * eps) + torch.finfo(v.dtype).tiny
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
    factor: Tensor = torch.linalg.cholesky_ex((v + v.mT) / 2 + ridge[:, None, None] * eye)[0]
    return factor


def _integrals(
    t_mean: Tensor, factor: Tensor, targets: Tensor, max_nodes: int
) -> tuple[Tensor, ...]:
    """Of :func:`_integrate`; a datum gets the rule that suits its logits' spread."""
    n, e = t_mean.shape
    basis = contrast_basis(e + 1, t_mean)
    if e == 1:  # the softmax over two classes is a sigmoid of √2 times the contrast
        x, w = gaussian_nodes(2**0.5 * t_mean[:, 0], 2**0.5 * factor[:, 0, 0])
        return _integrate(t_mean, factor, targets, basis, x[:, None], w.expand_as(x)[:, None])
    f = e * (e + 1)
    spread = factor.square().sum((-2, -1)) / e
    rules = [_rule(e, tier, max_nodes) for tier in range(len(_BOUNDS) + 1)]
    by_rule: dict[tuple[int, bool], list[int]] = {}
    for row, value in enumerate(spread.tolist()):
        by_rule.setdefault(rules[bisect_left(_BOUNDS, value)], []).append(row)
    order, found = [], []
    for rule, rows in by_rule.items():
        nodes, weights = standard_normal_nodes(e, *rule, t_mean.dtype, t_mean.device)
        order += rows
        given = [t_mean, factor, targets]
        if len(rows) < n:
            index = torch.tensor(rows, device=t_mean.device)
            given = [part[index] for part in given]
        size = max(1, _CHUNK // (nodes.shape[1] * f))
        for t, spreads, y in zip(*(part.split(size) for part in given), strict=True):
            found.append(_integrate(t, spreads, y, basis, nodes, weights))
    if len(found) == 1:
        return found[0]
    back = torch.tensor(order, device=t_mean.device).argsort()
    return tuple(torch.cat(parts)[back] for parts in zip(*found, strict=True))


@lru_cache
def _rule(dimensions: int, tier: int, max_nodes: int) -> tuple[int, bool]:
    """Count and kind of the nodes for one of the tiers of ``_PRODUCT_RULES`` (the last: Sobol)."""
    if tier < len(_PRODUCT_RULES):
        for count in _PRODUCT_RULES[tier][1]:
            if count**dimensions <= max_nodes:
                return count, False
    return max_nodes, True


def _integrate(
    t_mean: Tensor, factor: Tensor, targets: Tensor, basis: Tensor, nodes: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``E[φ]``, ``Cov(φ)`` and ``E[ρρᵀ]`` for ρ in a unit of its own, and that unit, ``[n, 1]``.

    Squares of residuals of saturated data would be nothing in single precision. Nodes come last,
    ``[(n,) E, J]``, so that every operation runs along contiguous memory.
    """
    logits = basis.mT @ torch.baddbmm(t_mean[..., None], factor, nodes.expand(len(factor), -1, -1))
    p = logits.sub_(logits.amax(1, keepdim=True)).exp_()
    p = p.div_(p.sum(1, keepdim=True)).sub_(targets[..., None])
    # The residuals add up to zero: that of the label, close to -0 or far more, from the others.
    label = targets.argmax(1, keepdim=True)
    label = torch.zeros_like(targets).scatter_(1, label, 1.0)[..., None]
    p = p.mul_(1 - label)
    unit = p.abs().amax((1, 2)).clamp_(min=torch.finfo(p.dtype).tiny)
    p = p.div_(unit[:, None, None])
    p = p.addcmul_(label, p.sum(1, keepdim=True), value=-1)
    rho = basis @ p  # [n, E, J]
    factors = torch.cat([torch.ones_like(nodes[..., :1, :]), nodes], -2)  # of ρ in φ
    phi = (factors[..., :, None, :] * rho[:, None]).flatten(1, 2)
    phi_mean = phi @ weights.mT  # [n, F, 1]
    phi.sub_(phi_mean).mul_(weights.sqrt())
    return phi_mean[..., 0], phi @ phi.mT, (rho * weights) @ rho.mT, unit[:, None]

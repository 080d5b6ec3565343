"""Regressions in closed form: sums over the data, noise by marginal likelihood, Student-t.

With the eigenvalues ``ω`` of ``Λ = H̃ᵀH̃`` every output is diagonal. For ``w ~ N(0, γ)`` and noise
``τ²`` the ridge is ``λ = τ²/γ``, the mean ``m = (Λ + λ)⁻¹ H̃ᵀy``, ``S = τ² (Λ + λ)⁻¹``. The noise is
where the marginal likelihood is stationary (MacKay 1992): ``τ² = |y - H̃m|² / ν`` with
``ν = n - Σ ω / (ω + λ)``, data less the parameters that they determine; ν is also the degrees of
freedom. A prior on request: ``γ = |m|² / Σ ω / (ω + λ)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesagg.constants import kept
from bayesagg.errors import NumericalWarning
from bayesagg.heads import Head
from bayesagg.posterior import augment, weighted_gram
from bayesagg.predicting.data import Rows
from bayesagg.predicting.state import Inferred

__all__ = ["Prior", "PriorVariance", "Sums", "share_of_small", "solve", "sums_of"]

PriorVariance = float | Literal["marginal_likelihood"] | None

_ITERATIONS, _TOLERANCE = 300, 1e-8
_LEAST = 1e-10  # of the labels' mean square: what a mean of squared residuals is known to
_FAR = 100.0  # variances of the outputs under a prior, from which labels contradict it
_OF_ZEROS = 1e-20  # taken for the mean square of labels that are all zero
_LEAST_SHARE = 1e-10  # of the precision of a prior, if all features are zero
_LEAST_DOF = 3.0  # a variance exists from 2 on


@dataclass(frozen=True)
class Prior:
    """Of the weights of a head, bias included: ``N(0, γ I)``.

    Attributes:
        variance: γ, or where it starts.
        relative: regressions take it in units of the mean square of their labels.
        learned: by marginal likelihood.
        per_weight: labels a weight that the variance of a regression is made for: it is
            ``γ min(1, n / (per_weight D))`` with n labels of an output of D weights.
        small: mean square of the features below which the variance is in units of it.
    """

    variance: float = 1.0
    relative: bool = False
    learned: bool = False
    per_weight: float = 0.0
    small: float = 0.0

    @staticmethod
    def of(head: Head) -> Prior:
        """That of a head under a rule that has none for predictions."""
        return Prior(head.prior_variance or 1.0)

    @staticmethod
    def alone(head: Head) -> Prior:
        """That of a head under no rule: its own, or one that suits labels of any unit."""
        return Prior(head.prior_variance or 1.0, relative=head.prior_variance is None)

    def given(self, variance: PriorVariance) -> Prior:
        """This one, unless another variance is given, which must be positive (or a ValueError)."""
        if variance is None:
            return self
        if variance == "marginal_likelihood":
            return replace(self, learned=True, small=0.0)
        if not isinstance(variance, int | float) or not 0 < variance < float("inf"):
            raise ValueError(
                f"prior_variance must be a positive number, 'marginal_likelihood' or None, got "
                f"{variance!r}."
            )
        return Prior(float(variance))

    def of_features(self, squares: Tensor, data: Tensor) -> Tensor:
        """What the variance is multiplied by.

        Args:
            squares: sums over the data of every squared feature, ``[G, d]``.
            data: how many, ``[o]``; ``G`` is ``o`` or 1.

        Returns:
            ``[o]``.
        """
        share = share_of_small(squares, data[:, None], self.small * squares.shape[1])
        return 1 / share[:, 0].clamp_min(_LEAST_SHARE)


def share_of_small(squares: Tensor, data: Tensor | float, small: Tensor | float) -> Tensor:
    """``min(1, q / small)`` with the mean q over the data of the sum of squared features.

    What the precision of a prior of features of the size of one is multiplied by, where they are
    smaller (docs/theory.md, "The prior").

    Args:
        squares: sums over the data of every squared feature, ``[G, d]``.
        data: how many, ``[G, 1]`` or a number.
        small: of q, ``[G, P]``, ``[G, 1]`` or a number; 0: never.

    Returns:
        ``[G, P]`` or ``[G, 1]``; one where there are neither data nor features.
    """
    share = squares.sum(1, keepdim=True) / (data * small)
    return torch.fmin(share, _one(share.dtype, share.device))  # of 0 / 0, too, one


@kept
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


class Sums(NamedTuple):
    """Sufficient statistics of ``o`` regressions, in float64.

    Attributes:
        gram: ``Λ``, ``[1, D, D]``, or ``[o, D, D]`` where labels are missing.
        shift: ``H̃ᵀy``, ``[o, D]``.
        square: ``yᵀy``, ``[o]``.
        labels: how many, ``[o]``.
    """

    gram: Tensor
    shift: Tensor
    square: Tensor
    labels: Tensor


def sums_of(pieces: Iterable[dict[str, Rows]], heads: Mapping[str, Head]) -> dict[str, Sums]:
    """Of the regressions in pieces of data; those of a piece share the Gram matrix."""
    found: dict[str, Sums] = {}
    for piece in pieces:
        known: dict[bool, tuple[Tensor, Tensor]] = {}
        for task, rows in piece.items():
            bias, y = heads[task].has_bias, rows.targets.double()
            if heads[task].kind != "regression":
                continue
            if bias not in known:
                h = augment(rows.features.double(), bias)
                known[bias] = h, (h.mT @ h)[None]
            h, gram = known[bias]
            count = y.new_full(y.shape[1:], len(y))
            if rows.present is not None:
                gram, count = weighted_gram(h, rows.present.double()), rows.present.double().sum(0)
            new = Sums(gram, y.mT @ h, y.square().sum(0), count)
            found[task] = Sums(*map(torch.add, found[task], new)) if task in found else new
    return found


def solve(
    sums: Mapping[str, Sums], heads: Mapping[str, Head], priors: Mapping[str, Prior]
) -> dict[str, Inferred]:
    """Posteriors of heads, by task; those on one Gram matrix are solved together.

    Every output has a label. A head that gives its noise as a number has it.

    Warns:
        NumericalWarning: of a prior that expects labels of another order of magnitude.
    """
    for name in sums:
        _compare(name, sums[name], priors[name])
    noises = {name: getattr(heads[name], "noise_variance", None) for name in sums}
    noises = {name: None if noise == "learned" else noise for name, noise in noises.items()}

    def alike(one: str, other: str) -> bool:
        some = [(priors[name], noises[name]) for name in (one, other)]
        forms = [(p.relative, p.learned, p.small, noise is None) for p, noise in some]
        grams = sums[one].gram, sums[other].gram
        return forms[0] == forms[1] and len(grams[0]) == 1 and torch.equal(*grams)

    groups: list[list[str]] = []
    for name in sums:
        group = next((names for names in groups if alike(names[0], name)), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    found = {}
    for names in groups:
        prior, parts = priors[names[0]], [sums[name] for name in names]
        shift, square, labels = (torch.cat(rows) for rows in list(zip(*parts, strict=True))[1:])
        widths = torch.tensor([len(part.labels) for part in parts], device=labels.device)
        numbers = [(priors[n].variance, noises[n] or 0.0, priors[n].per_weight) for n in names]
        settings = labels.new_tensor(numbers).repeat_interleave(widths, 0)
        gamma, given, per_weight = settings.unbind(1)
        enough = per_weight * parts[0].gram.shape[-1]
        gamma = gamma * torch.where(labels < enough, labels / enough, 1.0)
        squares = parts[0].gram.diagonal(dim1=1, dim2=2)[:, : heads[names[0]].in_features]
        gamma = gamma * prior.of_features(squares, labels)
        noise = None if noises[names[0]] is None else given
        together = _solve(Sums(parts[0].gram, shift, square, labels), prior, gamma, noise)
        start = 0
        for name, width in zip(names, widths.tolist(), strict=True):
            found[name] = together.part(slice(start, start := start + width))
    return found


def _compare(name: str, sums: Sums, prior: Prior) -> None:
    """Warn of labels some ten standard deviations of the prior's outputs from zero."""
    trace = sums.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    expected, level = prior.variance * trace / sums.labels, sums.square / sums.labels
    if prior.relative or prior.learned or not bool((level > _FAR * expected).any()):
        return
    place = int((level / expected).argmax())
    expected = expected.expand_as(level)
    warnings.warn(
        f"task {name!r}: a prior variance of {prior.variance:g} expects outputs of about "
        f"{float(expected[place].sqrt()):.2g}, the labels are of about "
        f"{float(level[place].sqrt()):.2g}: predictions may be close to zero. It is in squared "
        f"units of the labels: pass a larger one, or prior_variance='marginal_likelihood'.",
        NumericalWarning,
        stacklevel=6,
    )


def _solve(sums: Sums, prior: Prior, gamma: Tensor, noise: Tensor | None) -> Inferred:
    """With prior variances and given noises of every output, ``[o]``."""
    omega, vectors = torch.linalg.eigh(sums.gram)
    omega = omega.clamp_min(0)[:, None]
    # [G, P, D] with all outputs on one Gram matrix, or one output on each.
    shift = sums.shift[:, None] if len(vectors) > 1 else sums.shift[None]
    along = shift @ vectors
    count, square = (part.view(along.shape[:2]) for part in (sums.labels, sums.square))
    level = torch.where(square > 0, square / count, _OF_ZEROS)
    gamma = gamma.view_as(level) * (level if prior.relative else 1.0)

    def updated(log: Tensor) -> Tensor:
        """Logarithms of τ² and γ, and where the evidence of the weights there puts them."""
        tau2, gamma = log.exp()
        inverse = 1 / (omega + (tau2 / gamma)[..., None])
        mean, known = along * inverse, (omega * inverse).sum(-1)
        if noise is None:
            rest = square - 2 * (along * mean).sum(-1) + (omega * mean.square()).sum(-1)
            tau2 = torch.maximum(rest, _LEAST * level * count) / (count - known).clamp_min(1.0)
        if prior.learned:
            gamma = mean.square().sum(-1) / known.clamp_min(1e-12)
            gamma = torch.minimum(torch.maximum(gamma, 1e-12 * level), 1e12 * level)
        return torch.stack([tau2, gamma]).log()

    at = torch.stack([level if noise is None else noise.view_as(level), gamma]).log()
    for _ in range(_ITERATIONS):
        first = updated(at)
        if bool(((first - at).abs() < _TOLERANCE).all()):
            break
        second = updated(first)
        # The steps shrink by a constant ratio in the end: where they would lead (Aitken).
        ratio = ((second - first) / (first - at)).nan_to_num(0.0, 0.0, 0.0).clamp(0, 0.95)
        at = second + (second - first) * ratio / (1 - ratio)
    tau2, gamma = at.exp()
    inverse = 1 / (omega + (tau2 / gamma)[..., None])
    dof = (count - (omega * inverse).sum(-1)).clamp_min(_LEAST_DOF)
    return Inferred(
        ((along * inverse) @ vectors.mT).flatten(0, 1),
        vectors,
        inverse * tau2[..., None],
        noise=tau2.flatten(),
        dof=dof.flatten() if noise is None else torch.full_like(dof, torch.inf).flatten(),
    )

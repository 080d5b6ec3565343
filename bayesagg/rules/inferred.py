"""What each rule's memory says of the heads' weights, for predictions."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesagg.heads import Head, stacked
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.memory import FadingMemory
from bayesagg.moments import Spectrum
from bayesagg.posterior import Gaussian, contrast_basis
from bayesagg.predicting.state import Inferred
from bayesagg.rules.arrange import frame_of
from bayesagg.rules.settings import Settings
from bayesagg.rules.streaming import of_features, scales_and_ridges
from bayesagg.units import Unit

if TYPE_CHECKING:
    from bayesagg.rules.epochs import PaperMemory
    from bayesagg.rules.groups import Group

__all__ = ["of_fading", "of_paper"]

_FAR = 0.1  # of a head's outputs: rounding and a scale that has moved since do not come near


@torch.no_grad()
def of_fading(rule: Settings, memory: FadingMemory) -> dict[str, Inferred]:
    """From evidence that fades.

    ``S = τ² (Λ + λ)⁻¹`` of a regression, ``(cΛ + 1/γ)⁻¹`` with curvature c.

    The mean are the weights that the head has: the posterior mean that the last step has set, or
    those of its own gradient. Before the rule is at work, it is the mean of the evidence.
    """
    found: dict[str, Inferred] = {}
    for unit in memory.units:
        if unit.gram.diagonal(dim1=1, dim2=2).sum() > 0:
            found |= _of_unit(rule, memory, unit)
    return found


def _of_unit(rule: Settings, memory: FadingMemory, unit: Unit) -> dict[str, Inferred]:
    noise, ridge, spread = _columns(rule, memory, unit)
    posterior = Spectrum.of(unit.gram, unit.shift, ridge)
    variances = posterior.inverse * spread[..., None]
    found, start, written = {}, 0, memory.due is None
    for name in unit.names:
        head = memory.heads[name]
        own = slice(start, start + head.out_features)
        start += head.out_features
        rows = posterior.mean.flatten(0, 1)[own]
        exact, tau2 = BOUNDS[head.kind].exact, noise.flatten()[own]
        given = isinstance(getattr(head, "noise_variance", None), int | float)
        dof = torch.full_like(tau2, torch.inf if given else rule.degrees_of_freedom)
        if head.readout == "gradient":
            rows = stacked(head).to(rows)
        elif written:
            rows = _written(name, head, rows, unit.gram, 9)
        found[name] = Inferred(
            rows,
            posterior.vectors,
            variances if unit.wide else variances[:, own],
            noise=tau2 if exact else None,
            dof=dof if exact else None,
        )
    return found


def _columns(rule: Settings, memory: FadingMemory, unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """Of every column: noise, ridge, and what the inverse is multiplied by, ``[G, P]`` each."""
    heads, like = [memory.heads[name] for name in unit.names], unit.shift[..., 0]
    columns = [head for head in heads for _ in range(head.out_features)]
    columns = columns[: like.shape[1]]  # 1 where every output has a Gram matrix of its own
    exact = sum(BOUNDS[head.kind].exact for head in columns)
    frame, ones = frame_of(rule, memory, [unit], exact, like), torch.ones_like(unit.scale[:, 0])
    length = rule.memory_of(unit.gram.shape[-1])
    lengths = [length] if unit.repeats is None else unit.repeats.lengths(length)
    frame = frame.of_few(lengths, length)
    recent = unit.scale[:, [0, 1, 2, 0, 2]]  # predictions are of now
    current, ridge = scales_and_ridges(frame, exact, False, recent, ones, ones[:, :exact])
    if memory.due is None:
        ridge = of_features(ridge, frame.small, unit.gram, heads[0].has_bias, lengths)
    curvatures = [BOUNDS[head.kind].curvature_of(head.out_features) for head in columns]
    spread = 1 / like.new_tensor(curvatures)
    noise = torch.ones_like(like)
    noise[:, :exact] = current[:, :exact]
    return noise, ridge.expand_as(like), spread * noise


@torch.no_grad()
def of_paper(memory: PaperMemory) -> dict[str, Inferred]:
    """From the full-data posterior, or what has faded where no epoch ended.

    Classifications that keep their own gradient have their own weights as the mean.
    """
    found: dict[str, Inferred] = {}
    for group, state in zip(memory.groups, memory.states, strict=True):
        evidence = state.full or state.faded or state.running
        if evidence is None:
            continue
        learned = state.learned(None, evidence.count) if group.learns else None
        posterior = group.posterior(evidence, learned)
        noise = group.scales(evidence.count if learned is None else learned)
        counts = evidence.count.tolist()
        for name, own in group.slices.items():
            if name not in memory.owning and min(counts[own]) > 0:
                found[name] = _of_group(group, posterior, name, own, noise, evidence.count)
                if memory.written and name in memory.spared():
                    gram = evidence.precision[own if len(evidence.precision) > 1 else slice(None)]
                    together = gram.shape[-1] > group.likelihood.width  # of all classes
                    head, mean = group.heads[name], found[name].mean
                    mean = _written(name, head, mean, None if together else gram, 8)
                    found[name] = replace(found[name], mean=mean)
    return found


def _written(name: str, head: Head, mean: Tensor, gram: Tensor | None, depth: int) -> Tensor:
    """Weights of a head that steps set to the posterior mean: those that the network goes by.

    Warns, ``depth`` calls up, if they are others than that mean, ``[o, D]``, by now. Outputs are
    compared, by the Gram matrix of the evidence, ``[1 or o, D, D]``; without one, weights.
    """
    own = stacked(head).to(mean)
    off, size = (
        (w.square() if gram is None else (w[:, None] @ gram)[:, 0] * w).sum()
        for w in (own - mean, mean)
    )
    if bool(off > _FAR**2 * size):
        warnings.warn(
            f"task {name!r}: the weights of its head are not those that its evidence gives. If "
            f"weights were restored or averaged, what is known of them is of other features: load "
            f"the optimizer's state that was saved with them, or pass data, as in "
            f"predictor(model, train_loader).",
            stacklevel=depth,
        )
    return own


def _of_group(
    group: Group, posterior: Gaussian, name: str, own: slice, noise: Tensor, count: Tensor
) -> Inferred:
    head, likelihood = group.heads[name], group.likelihood
    mean = group.means(posterior)[name]
    if name not in group.inferred:
        mean = stacked(head).to(mean)
    whitener = posterior.whitener
    if head.kind == "multiclass" and likelihood.rows == 1:  # contrasts, all in one Gaussian
        basis = contrast_basis(likelihood.classes, mean)
        root = whitener[0].view(-1, len(basis), likelihood.width)
        return Inferred(mean, rotation=basis.mT, root=root)
    whitener = whitener if len(whitener) == 1 else whitener[own]
    _, values, rows = torch.linalg.svd(whitener)
    variances = values.square()[:, None]
    if len(whitener) == 1:
        variances = variances.expand(-1, head.out_features, -1)
    fields = {}
    if head.kind == "regression":
        free = torch.tensor([tau2 is None for tau2 in group.scale[own]], device=noise.device)
        fields["noise"] = noise[own]
        # Labels less the weights that they determine, as of a fit to data.
        dof = (count[own] - likelihood.width).clamp_min(3.0)
        fields["dof"] = torch.where(free, dof, torch.inf)
    return Inferred(mean, rows.mT, variances, **fields)

"""Heads that the paper's rule computes together, with all settings, and what is known of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bayesagg.checking import check, check_keys, tensor_leaf
from bayesagg.errors import NumericalError
from bayesagg.heads import Head, check_kinds
from bayesagg.likelihoods import LIKELIHOODS, Evidence, Likelihood
from bayesagg.posterior import Gaussian, from_natural
from bayesagg.reading import Labels, Part

__all__ = ["Group", "State", "make_groups"]

_LAG = 0.9  # weight of the past in the running means of learned scales
_LEAST = 1e-10  # of the labels' mean square: what a mean of squared residuals is known to
_EVIDENCE = ("full", "running", "faded")
_PARTS = ("precision", "shift", "count")


@dataclass(frozen=True, eq=False)
class Group:
    """``K`` tasks of one likelihood.

    Attributes:
        heads: by name.
        likelihood: of them.
        slices: tasks of every head.
        s: exponent of Eq. 7, by task.
        prior_variance: γ, by task.
        scale: τ² of the likelihood, by task; ``None``: learned.
        inferred: heads with ``readout="posterior"``.
    """

    heads: Mapping[str, Head]
    likelihood: Likelihood
    slices: Mapping[str, slice]
    s: tuple[float, ...]
    prior_variance: tuple[float, ...]
    scale: tuple[float | None, ...]
    inferred: tuple[str, ...]

    @property
    def num_tasks(self) -> int:
        """``K``."""
        return len(self.s)

    @property
    def learns(self) -> bool:
        """Whether the scale of some likelihood is learned."""
        return None in self.scale

    def labels(self, parts: Mapping[str, Part], rows: int, like: Tensor) -> Labels:
        """Labels of all heads, in the dtype of ``like``; those that are in no part have none."""
        found = [parts.get(name) for name in self.heads]
        first = found[0]
        if first is not None and first.labels is not None and first.names == tuple(self.heads):
            return first.labels.to(like.dtype)
        shape = self.likelihood.label_shape
        joined = []
        for part, (name, head) in zip(found, self.heads.items(), strict=True):
            if part is None or part.labels is None:
                zeros = like.new_zeros(rows, head.num_tasks, *shape)
                none = zeros.new_zeros(rows, head.num_tasks, dtype=torch.bool)
                joined.append(Labels(zeros, zeros, like.new_ones(1, head.num_tasks), none))
            else:
                own = part.slices[name]
                joined.append(part.labels.columns(own.start, own.stop).to(like.dtype))
        return Labels.join(joined)

    def posterior(self, evidence: Evidence, learned: Tensor | None) -> Gaussian:
        """Evidence for a unit scale under the isotropic prior, as one Gaussian (Eq. 9).

        ``learned``: τ² of every task, ``[K]``, of which those that are learned count.
        """
        fixed = self.scale[0]
        if learned is None and fixed is not None and len(set(self.scale)) == 1:
            precision, shift = evidence.precision / fixed, evidence.shift / fixed
        else:
            tau2 = self.scales(evidence.count if learned is None else learned)
            precision = evidence.precision / tau2[:, None, None]
            shift = evidence.shift / tau2[:, None]
        prior: Tensor | float = 1 / self.prior_variance[0]
        if len(set(self.prior_variance)) > 1:
            prior = 1 / precision.new_tensor(self.prior_variance)[:, None]
            precision = precision.expand(self.num_tasks, -1, -1).contiguous()
        precision.diagonal(dim1=-2, dim2=-1).add_(prior)
        try:
            return from_natural(precision, shift)
        except NumericalError as error:
            raise NumericalError(f"tasks {', '.join(map(repr, self.heads))}: {error}") from None

    def scales(self, learned: Tensor) -> Tensor:
        """τ² of every task: that of its head, or else the learned one, ``[K]``."""
        fixed = learned.new_tensor([torch.nan if scale is None else scale for scale in self.scale])
        return torch.where(fixed.isnan(), learned, fixed)

    def by_head(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all tasks, ``[K]``, by head."""
        return {name: values[own] for name, own in self.slices.items()}

    def means(self, posterior: Gaussian) -> dict[str, Tensor]:
        """Posterior mean of every head, ``[o, D]``, bias last."""
        rows = self.likelihood.module_weights(posterior.mean)
        sizes = [head.out_features for head in self.heads.values()]
        return dict(zip(self.heads, rows.split(sizes), strict=True))


@dataclass(frozen=True)
class State:
    """Evidence of a group of ``K`` tasks, and the learned scales.

    Attributes:
        full: evidence of the last epoch, the prior of a step.
        running: of this epoch, or since the start where none has ended.
        faded: the prior of a step where no epoch has ended.
        scale: sums of the running means of learned scales and of their weights, ``[2, K]``.
    """

    full: Evidence | None = None
    running: Evidence | None = None
    faded: Evidence | None = None
    scale: Tensor | None = None

    def learned(self, squares: Tensor | None, count: Tensor) -> Tensor:
        """Learned τ² of every task, ``[K]``; at first that of the batch itself, 1 without labels.

        ``squares``: of a batch, ``[2, K]``, and how many labels it has, ``[K]``.
        """
        otherwise = torch.ones_like(count)
        if squares is not None:
            otherwise = torch.where(count > 0, _mean_square(squares, count), otherwise)
        if self.scale is None:
            return otherwise
        total, weight = self.scale
        return torch.where(weight > 0, total / weight, otherwise)

    def moved(self, squares: Tensor | None, count: Tensor) -> Tensor | None:
        """The running means with those of a batch, over the steps in which a task has labels."""
        if squares is None:
            return self.scale
        value = _mean_square(squares, count)
        new = torch.stack([value, torch.ones_like(value)])
        old = torch.zeros_like(new) if self.scale is None else self.scale
        return torch.where(count > 0, _LAG * old + (1 - _LAG) * new, old)

    def end_epoch(self) -> State:
        """The epoch's evidence as prior of the next; a task without a label in it keeps its own."""
        new, old = self.running, self.full
        if new is not None and old is not None and not bool((new.count > 0).all()):
            seen = new.count > 0
            wide = max(len(new.precision), len(old.precision)) > 1
            keep = seen[:, None, None] if wide else seen.any()
            new = Evidence(
                torch.where(keep, new.precision, old.precision),
                torch.where(seen[:, None], new.shift, old.shift),
                torch.where(seen, new.count, old.count),
            )
        return State(old if new is None else new, None, None, self.scale)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint: tensors and dicts, copied."""
        found: dict[str, Any] = {"scale": None if self.scale is None else self.scale.clone()}
        for key in _EVIDENCE:
            part = getattr(self, key)
            found[key] = part and {name: getattr(part, name).clone() for name in _PARTS}
        return found

    @staticmethod
    def read(plain: dict[str, Any], group: Group, like: Tensor) -> State:
        """Inverse of :meth:`plain`, in the dtype and on the device of ``like``."""
        what = "tasks " + ", ".join(map(repr, group.heads))
        scale = plain["scale"]
        if scale is not None:
            check(group.learns, f"{what}: there is a learned noise variance, which these fix")
            scale = tensor_leaf(scale, (2, group.num_tasks), like, f"{what}: noise estimate", 0.0)
        full, running, faded = (
            _evidence(plain[key], group, like, f"{what}: {key}") for key in _EVIDENCE
        )
        return State(full, running, faded, scale)


def make_groups(heads: Mapping[str, Head]) -> list[Group]:
    """Heads that can be computed together, in the order of their first members.

    Warns:
        UserWarning: of a setting without effect.
        NumericalWarning: as of :meth:`bayesagg.likelihoods.Likelihood.of`.
    """
    check_kinds(heads, LIKELIHOODS, "the paper's rule (likelihoods.LIKELIHOODS)")
    found: dict[Any, dict[str, dict[str, Any]]] = {}
    for name, head in heads.items():
        own = _settings(name, head)
        samples = own["num_samples"] if own.get("moments") == "monte_carlo" else None
        likelihood = LIKELIHOODS[head.kind].of(name, head, samples)
        # Tasks of several Gaussians have a precision of their own.
        alone = name if likelihood.rows > 1 else None
        found.setdefault((type(likelihood), likelihood, alone), {})[name] = own
    return [
        _group({name: heads[name] for name in settings}, likelihood, list(settings.values()))
        for (_, likelihood, _), settings in found.items()
    ]


def _settings(name: str, head: Head) -> dict[str, Any]:
    """Settings of a head, those that it leaves out by its likelihood."""
    defaults = LIKELIHOODS[head.kind].defaults
    given = {key: getattr(head, key) for key in defaults}
    found = {key: defaults[key] if value is None else value for key, value in given.items()}
    if given.get("num_samples") is not None and found["moments"] == "quadrature":
        warnings.warn(
            f"task {name!r}: num_samples has no effect with moments='quadrature'; "
            f"moments='monte_carlo' (Eq. 11) uses it.",
            stacklevel=6,
        )
    return found


def _group(
    heads: Mapping[str, Head], likelihood: Likelihood, settings: Sequence[Mapping[str, Any]]
) -> Group:
    pairs = list(zip(heads.values(), settings, strict=True))
    each = [own for head, own in pairs for _ in range(head.num_tasks)]
    ends = list(accumulate(head.num_tasks for head in heads.values()))
    scales = [own.get("noise_variance", 1.0) for own in each]
    return Group(
        heads,
        likelihood,
        dict(zip(heads, map(slice, [0, *ends], ends), strict=True)),
        tuple(float(own["s"]) for own in each),
        tuple(float(own["prior_variance"]) for own in each),
        tuple(None if scale == "learned" else float(scale) for scale in scales),
        tuple(
            name
            for name, own in zip(heads, settings, strict=True)
            if own["readout"] == "posterior" and heads[name].writable
        ),
    )


def _evidence(plain: Any, group: Group, like: Tensor, what: str) -> Evidence | None:
    if plain is None:
        return None
    check_keys(plain, _PARTS, what)
    tasks, m = group.num_tasks, group.likelihood.parameters
    value = plain["precision"]
    shared = group.likelihood.shares and isinstance(value, Tensor) and value.shape[:1] == (1,)
    groups = 1 if shared else tasks
    precision = tensor_leaf(value, (groups, m, m), like, f"{what} precision")
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    check(bool((diagonal >= 0).all()), f"{what} precision has a negative diagonal")
    shift = (tasks * group.likelihood.rows, m)
    return Evidence(
        precision,
        tensor_leaf(plain["shift"], shift, like, f"{what} shift"),
        tensor_leaf(plain["count"], (tasks,), like, f"{what} count", 0.0),
    )


def _mean_square(squares: Tensor, count: Tensor) -> Tensor:
    """Mean squared residual, ``[K]``, kept above rounding of the labels themselves."""
    residual, level = squares / count.clamp(min=1)
    return torch.maximum(residual, _LEAST * level + torch.finfo(count.dtype).tiny)

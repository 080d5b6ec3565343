"""Heads that share a Gram matrix: their evidence, their scales, and how a checkpoint has them.

A *unit* are heads that share Gram matrices: all heads that read one tensor, as long as every datum
has every label; a head by itself where not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesagg.checking import check, check_keys, scalar_leaf, tensor_leaf
from bayesagg.errors import CheckpointError
from bayesagg.heads import Head
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.repeats import Repeats, load_repeats

__all__ = ["Basis", "Frame", "Unit", "decays", "load_unit", "running_mean"]

_TENSORS = ("gram", "shift", "scale")
_BASIS = ("vectors", "values", "mean")


@dataclass(frozen=True)
class Basis:
    """An eigenbasis of the evidence that serves for some steps, where a new one costs too much.

    Attributes:
        vectors: ``Q``, ``[G, D, D]``.
        values: diagonal of ``QᵀΛQ`` for the evidence of now, ``[G, D]``.
        mean: of the last step, ``[G, P, D]``.
        left: steps until it is renewed.
    """

    vectors: Tensor
    values: Tensor
    mean: Tensor
    left: int


@dataclass(frozen=True)
class Unit:
    """Heads that share Gram matrices, in the order of their columns.

    Attributes:
        names: of the heads; ``P`` outputs (classes) together.
        wide: every output of the one head has a Gram matrix of its own: then ``P`` is 1 below and
            ``G`` the number of outputs, else ``G`` is 1.
        weighted: labels may be missing or have weights.
        gram: ``Λ = Σ w h̃ h̃ᵀ``, ``[G, D, D]``.
        shift: ``Σ w t h̃``, ``[G, P, D]``, of the working responses t.
        started: there is evidence, and every task has a scale; of weighted units never sure.
        scale: running means, ``[G, 5, T]``, ``T`` is 1 if wide. Rows 0 to 2 go back few steps: of
            every task's scale, of the level of its labels (their mean square; 1 where they have no
            unit), and their weight; 3 and 4 more: of the scale it is weighed by, and its weight.
        basis: of the evidence; ``None``: the next step makes one.
        repeats: how many data there are; ``None``: nobody asks, or no label tells.
    """

    names: tuple[str, ...]
    wide: bool
    weighted: bool
    started: bool
    gram: Tensor
    shift: Tensor
    scale: Tensor
    basis: Basis | None = None
    repeats: Repeats | None = None

    @staticmethod
    def empty(
        names: Sequence[str],
        heads: Mapping[str, Head],
        weighted: bool,
        counting: bool,
        like: Tensor,
    ) -> Unit:
        """Before any evidence.

        Args:
            names: of its heads.
            heads: by name.
            weighted: labels may be missing or have weights.
            counting: whether to find out how many data there are, if labels tell.
            like: device and dtype.
        """
        first = heads[names[0]]
        width = first.in_features + first.has_bias
        outputs = sum(heads[name].out_features for name in names)
        tasks = sum(heads[name].num_tasks for name in names)
        wide = weighted and len(names) == 1 and tasks == outputs > 1
        groups, columns = (outputs, 1) if wide else (1, outputs)
        counting = counting and any(BOUNDS[heads[name].kind].exact for name in names)
        return Unit(
            tuple(names),
            wide,
            weighted,
            False,
            like.new_zeros(groups, width, width),
            like.new_zeros(groups, columns, width),
            like.new_zeros(groups, 5, 1 if wide else tasks),
            repeats=Repeats.empty(groups, like) if counting else None,
        )

    def alone(self, heads: Mapping[str, Head]) -> list[Unit]:
        """One unit a head, each with this one's evidence, whose labels may be missing from now."""
        if self.weighted:
            return [self]
        units, column, task = [], 0, 0
        for name in self.names:
            outputs, tasks = heads[name].out_features, heads[name].num_tasks
            shift = self.shift[:, column : column + outputs]
            scale = self.scale[:, :, task : task + tasks]
            unit = Unit.empty([name], heads, True, self.repeats is not None, self.gram)
            wide = unit.wide
            units.append(
                replace(
                    unit,
                    gram=self.gram.expand(outputs, -1, -1) if wide else self.gram,
                    shift=shift.transpose(0, 1) if wide else shift,
                    scale=scale.permute(2, 1, 0) if wide else scale,
                )
            )
            column, task = column + outputs, task + tasks
        return units

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""
        basis = self.basis
        return {
            "names": list(self.names),
            "weighted": self.weighted,
            "started": self.started,
            **{key: getattr(self, key).clone() for key in _TENSORS},
            "basis": None
            if basis is None
            else {"left": basis.left, **{key: getattr(basis, key).clone() for key in _BASIS}},
            "repeats": None if self.repeats is None else self.repeats.state_dict(),
        }


@dataclass(frozen=True)
class Frame:
    """What the rows of a stack of units belong to; the same in every step.

    Attributes:
        names: of the heads, by unit.
        wide: Gram matrices of every unit, if these are wide; else ``None``, and each has one.
        tasks: of every head, by unit.
        columns: outputs (classes) of every head, by unit.
        noise: fixed noise variances, ``[G, R]``, 0 where it is learned; ``None``: nowhere fixed.
        ridge: ``1 / c γ``, per unit of noise, ``[G, P]``; ``[G, 1]`` where it is one number of
            classifications alone.
        exact: R, regressions among the columns, which come first.
        small: sum of a datum's squared features below which γ is in units of it, in the shape of
            ``ridge``; 0 where somebody has set γ.
        least_scale: of tasks that are not exact.
    """

    names: list[tuple[str, ...]]
    wide: list[int] | None
    tasks: list[list[int]]
    columns: list[list[int]]
    noise: Tensor | None
    ridge: Tensor
    exact: int
    small: Tensor
    least_scale: float

    def of_few(self, data: Sequence[float], enough: float) -> Frame:
        """With ``γ min(1, n / enough)`` for regressions whose γ nobody has set.

        Features that are fitted to few labels fit their noise, and so would the heads
        (docs/theory.md, "The prior").

        Args:
            data: n, how many there are, of every Gram matrix (G) or one number for all.
            enough: for γ as it is.
        """
        exact = self.exact
        if not exact or all(n >= enough for n in data):
            return self
        share = self.ridge.new_tensor([max(n, 1.0) / enough for n in data])[:, None]
        ridge = self.ridge[:, :exact] / torch.where(self.small[:, :exact] > 0, share, 1.0)
        return replace(self, ridge=torch.cat([ridge, self.ridge[:, exact:]], 1))

    def by_head(self, values: Tensor, tasks: bool) -> dict[str, Tensor]:
        """Rows ``[G, P, …]`` of all columns, or ``[G, T, …]`` of all tasks, by head."""
        rows = values.unbind() if self.wide is None else values[:, 0].split(self.wide)
        found: dict[str, Tensor] = {}
        sizes = self.tasks if tasks else self.columns
        for names, some, part in zip(self.names, sizes, rows, strict=True):
            if len(some) == 1:
                found[names[0]] = part
            else:
                found.update(zip(names, part.split_with_sizes(some), strict=True))
        return found


def decays(recent: float, long: float, like: Tensor) -> Tensor:
    """Weights of the past in the five running means of a unit, ``[5, 1]``; without a copy."""
    found = like.new_full((5, 1), recent)
    found[3:].fill_(long)
    return found


def running_mean(
    state: Tensor, rows: Sequence[Tensor], seen: Tensor | None, decay: Tensor | float
) -> Tensor:
    """Exponential running means, kept as sums of values and of weights.

    Args:
        state: before, ``[…, R, T]``; zeros at the start.
        rows: values, and ones for their weight, ``R`` tensors ``[…, T]``.
        seen: booleans ``[…]``, ``None``: all; where not, the means stay as they are.
        decay: of the weight of the past, ``[R, 1]`` or one for all.
    """
    new = torch.stack([*rows], -2)
    moved = torch.lerp(new, state, decay)
    return moved if seen is None else torch.where(seen[..., None, None], moved, state)


def load_unit(state: Any, heads: Mapping[str, Head], counting: bool, like: Tensor) -> Unit:
    """A unit of a checkpoint.

    Raises:
        CheckpointError: if any part of the state does not fit the heads.
    """
    keys = ("names", "weighted", "started", "basis", "repeats", *_TENSORS)
    check_keys(state, keys, "a unit of evidence")
    names = state["names"]
    check(
        isinstance(names, list)
        and len(names) > 0
        and all(isinstance(name, str) and name in heads for name in names),
        f"it has evidence of tasks {names!r}, of which some are not known here",
    )
    for key in ("weighted", "started"):
        check(isinstance(state[key], bool), f"a mark of evidence ({key}) is not a boolean")
    first = heads[names[0]]
    check(
        all(
            heads[n].in_features == first.in_features and heads[n].has_bias == first.has_bias
            for n in names
        ),
        f"tasks {names!r} cannot share evidence",
    )
    blank = Unit.empty(names, heads, state["weighted"], counting, like)
    what = "tasks " + ", ".join(map(repr, names))
    found = {
        key: tensor_leaf(
            state[key],
            tuple(getattr(blank, key).shape),
            like,
            f"{what}: {key}",
            minimum=0.0 if key == "scale" else None,
        )
        for key in _TENSORS
    }
    if bool((found["gram"].diagonal(dim1=-2, dim2=-1) < 0).any()):
        raise CheckpointError(f"{what}: the evidence in the checkpoint is not a Gram matrix.")
    basis = None if state["basis"] is None else _basis(state["basis"], blank, like, what)
    repeats = state["repeats"]
    check(
        (repeats is None) == (blank.repeats is None),
        f"{what}: `memory` of the rule was set when it was saved, or is set now, but not both",
    )
    if blank.repeats is not None:
        repeats = load_repeats(repeats, blank.repeats, what)
    return replace(
        blank,
        started=state["started"],
        basis=basis,
        repeats=repeats,
        gram=found["gram"],
        shift=found["shift"],
        scale=found["scale"],
    )


def _basis(state: Any, unit: Unit, like: Tensor, what: str) -> Basis:
    """A basis of a checkpoint, checked."""
    check_keys(state, ("left", *_BASIS), f"{what}: the basis")
    shapes = (unit.gram.shape, unit.gram.shape[:2], unit.shift.shape)
    tensors = [
        tensor_leaf(state[key], tuple(shape), like, f"{what}: {key}")
        for key, shape in zip(_BASIS, shapes, strict=True)
    ]
    check(bool((tensors[1] >= 0).all()), f"{what}: values of the basis are negative")
    left = scalar_leaf(state["left"], int, f"{what}: steps of the basis", 0)
    return Basis(tensors[0], tensors[1], tensors[2], left)

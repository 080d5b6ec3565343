"""Evidence that fades by the datum, and the learned scales: all that the default rule remembers.

A *unit* are heads that share Gram matrices: all heads that read one tensor, as long as every datum
has every label; a head by itself where not. What a unit holds is additive over data, but for the
fading ``Λ ← exp(-n / N) Λ + H̃ᵀH̃`` for a batch of ``n`` data and a memory of ``N``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayesagg.checking import check, check_keys, scalar_leaf, tensor_leaf
from bayesagg.errors import CheckpointError
from bayesagg.heads import Head, LossTask
from bayesagg.invariance import step_is_invariant

__all__ = ["Basis", "FadingMemory", "Frame", "Unit", "Update", "means_of", "running_mean"]


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
        scale: running means of every task's scale and of the level of its labels (their mean
            square; 1 where they have no unit), ``[G, 3, T]``; ``T`` is 1 if wide.
        basis: of the evidence; ``None``: the next step makes one.
    """

    names: tuple[str, ...]
    wide: bool
    weighted: bool
    started: bool
    gram: Tensor
    shift: Tensor
    scale: Tensor
    basis: Basis | None = None

    @staticmethod
    def empty(
        names: Sequence[str], heads: Mapping[str, Head], weighted: bool, like: Tensor
    ) -> Unit:
        """Before any evidence; ``like`` has the device and the dtype."""
        first = heads[names[0]]
        width = first.in_features + first.has_bias
        outputs = sum(heads[name].out_features for name in names)
        tasks = sum(heads[name].num_tasks for name in names)
        wide = weighted and len(names) == 1 and tasks == outputs > 1
        groups, columns = (outputs, 1) if wide else (1, outputs)
        return Unit(
            tuple(names),
            wide,
            weighted,
            False,
            like.new_zeros(groups, width, width),
            like.new_zeros(groups, columns, width),
            like.new_zeros(groups, 3, 1 if wide else tasks),
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
            wide = tasks == outputs > 1
            units.append(
                Unit(
                    (name,),
                    wide,
                    True,
                    False,
                    self.gram.expand(outputs, -1, -1) if wide else self.gram,
                    shift.transpose(0, 1) if wide else shift,
                    scale.permute(2, 1, 0) if wide else scale,
                )
            )
            column, task = column + outputs, task + tasks
        return units


@dataclass(frozen=True)
class Frame:
    """What the rows of a stack of units belong to; the same in every step.

    Attributes:
        names: of the heads, by unit.
        wide: Gram matrices of every unit, if these are wide; else ``None``, and each has one.
        tasks: of every head, by unit.
        columns: outputs (classes) of every head, by unit.
        noise: fixed noise variances, ``[G, R]``, 0 where it is learned; ``None``: nowhere fixed.
        ridge: ``1 / c γ``, per unit of noise, ``[G, P]``.
        least_scale: of tasks that are not exact.
    """

    names: list[tuple[str, ...]]
    wide: list[int] | None
    tasks: list[list[int]]
    columns: list[list[int]]
    noise: Tensor | None
    ridge: Tensor
    least_scale: float

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


@dataclass
class Update:
    """What a step has found of the units that took part.

    Attributes:
        units: with the evidence of the step.
        others: scales of tasks without inference, ``[2]`` each.
        length: of aggregate and plain gradient, ``[2]``.
        steps: of the memory that the step saw.
        before: units that it saw, each with what its evidence was multiplied by.
        decay: of the running means.
    """

    units: list[Unit] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    length: Tensor | None = None
    steps: int = 0
    before: list[tuple[Unit, Tensor | float]] = field(default_factory=list)
    decay: float = 1.0


def running_mean(
    state: Tensor, values: Sequence[Tensor], seen: Tensor | None, decay: float
) -> Tensor:
    """Exponential running means, kept as sums of values and, in the last row, of weights.

    Args:
        state: before, ``[…, R + 1, T]``; zeros at the start.
        values: ``R`` tensors ``[…, T]``.
        seen: booleans ``[…]``, ``None``: all; where not, the means stay as they are.
        decay: of the weight of the past.
    """
    new = torch.stack([*values, torch.ones_like(values[0])], -2)
    moved = torch.lerp(new, state, decay)
    return moved if seen is None else torch.where(seen[..., None, None], moved, state)


def means_of(state: Tensor, otherwise: Sequence[Tensor]) -> list[Tensor]:
    """The running means, ``R`` tensors ``[…, T]``; ``otherwise`` before the first value."""
    *sums, weight = state.unbind(-2)
    known = weight > 0
    return [torch.where(known, s / weight, o) for s, o in zip(sums, otherwise, strict=True)]


class FadingMemory:
    """The state of :class:`bayesagg.rules.LikelihoodRule`.

    Args:
        tasks: heads, and losses without one, by name.
        dtype: of the evidence.

    Attributes:
        units: evidence of all heads that were seen.
        others: scales of tasks without inference.
        length: running squared lengths of the aggregate and of the plain gradient, ``[2]``.
        steps: backward passes so far.
        invariant: whether the optimizer's step does not depend on the scale of the gradient.
        frames: of stacks of units, which the rule makes once; no state.
    """

    def __init__(self, tasks: Mapping[str, Head | LossTask], dtype: torch.dtype) -> None:
        self.tasks, self.dtype = dict(tasks), dtype
        self.heads = {name: head for name, head in tasks.items() if isinstance(head, Head)}
        self.units: list[Unit] = []
        self.others: dict[str, Tensor] = {}
        self.length: Tensor | None = None
        self.steps, self.invariant = 0, False
        self.frames: dict[tuple[object, ...], Frame] = {}
        self._zero = torch.zeros((), dtype=dtype)

    def zero(self, device: torch.device) -> Tensor:
        """A number of the evidence's dtype; it is not to be changed."""
        if self._zero.device != device:
            self._zero = self._zero.to(device)
        return self._zero

    def commit(self, update: Update) -> None:
        """Take in what a step has found; its backward pass has run."""
        if update.steps != self.steps:  # two scalars, and one backward pass for both
            update = self._merged(update)
        taken = {name for unit in update.units for name in unit.names}
        self.units = [u for u in self.units if not taken.intersection(u.names)] + update.units
        self.others.update(update.others)
        self.length = update.length
        self.steps += 1

    def _merged(self, update: Update) -> Update:
        """An update of what the memory was, as one of what it is now."""
        now = {unit.names: unit for unit in self.units}
        seen = {unit.names: (unit, fade) for unit, fade in update.before}
        units = []
        for unit in update.units:
            current, (before, fade) = now.get(unit.names), seen.get(unit.names, (unit, 1.0))
            if current is None or current.gram.shape != unit.gram.shape:
                units.append(unit)
                continue
            wide = fade[..., None] if isinstance(fade, Tensor) else fade
            units.append(
                replace(
                    unit,
                    gram=unit.gram + wide * (current.gram - before.gram),
                    shift=unit.shift + wide * (current.shift - before.shift),
                    scale=unit.scale + update.decay * (current.scale - before.scale),
                    basis=None,
                )
            )
        return replace(update, units=units)

    def end_epoch(self) -> dict[str, Tensor]:
        """Nothing: evidence fades by the datum."""
        return {}

    def stepped(self) -> dict[str, Tensor]:
        """Nothing: heads are written when the backward pass is over."""
        return {}

    def met(self, optimizer: Optimizer) -> None:
        """The optimizer that takes the steps is known."""
        self.invariant = step_is_invariant(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""
        return {
            "units": [
                {
                    "names": list(unit.names),
                    "weighted": unit.weighted,
                    "started": unit.started,
                    **{key: getattr(unit, key).clone() for key in _TENSORS},
                    "basis": None
                    if unit.basis is None
                    else {
                        "left": unit.basis.left,
                        **{key: getattr(unit.basis, key).clone() for key in _BASIS},
                    },
                }
                for unit in self.units
            ],
            "others": {name: value.clone() for name, value in self.others.items()},
            "length": None if self.length is None else self.length.clone(),
            "steps": self.steps,
            "invariant": self.invariant,
        }

    def loaded(self, state: Any, device: torch.device) -> FadingMemory:
        """A memory in the state of a checkpoint; this one is unchanged.

        Raises:
            CheckpointError: if any part of the state does not fit these tasks.
        """
        check_keys(
            state, ("units", "others", "length", "steps", "invariant"), "the default rule's memory"
        )
        memory = type(self)(self.tasks, self.dtype)
        memory.steps = scalar_leaf(state["steps"], int, "the number of steps", minimum=0)
        check(isinstance(state["invariant"], bool), "the mark of the optimizer is not a boolean")
        memory.invariant = state["invariant"]
        like = torch.zeros(0, dtype=self.dtype, device=device)
        check(isinstance(state["units"], list), "the units of evidence are not a list")
        seen: set[str] = set()
        for part in state["units"]:
            unit = _unit(part, self.heads, like)
            check(not seen.intersection(unit.names), f"task {unit.names[0]!r} has evidence twice")
            seen.update(unit.names)
            memory.units.append(unit)
        check(isinstance(state["others"], dict), "the scales of losses are not a dict")
        for name, value in state["others"].items():
            check(name in self.tasks, f"it has the scale of a task {name!r} that is not known here")
            what = f"task {name!r}: the scale"
            memory.others[name] = tensor_leaf(value, (2,), like, what)
        check((state["length"] is None) == (memory.steps == 0), "the running lengths are missing")
        if state["length"] is not None:
            memory.length = tensor_leaf(
                state["length"], (2,), like, "the running lengths", minimum=0.0
            )
        return memory


_TENSORS = ("gram", "shift", "scale")
_BASIS = ("vectors", "values", "mean")


def _unit(state: Any, heads: Mapping[str, Head], like: Tensor) -> Unit:
    """A unit of a checkpoint, checked."""
    check_keys(state, ("names", "weighted", "started", "basis", *_TENSORS), "a unit of evidence")
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
    blank = Unit.empty(names, heads, state["weighted"], like)
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
    return replace(
        blank,
        started=state["started"],
        basis=basis,
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

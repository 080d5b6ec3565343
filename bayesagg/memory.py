"""Evidence that fades by the datum, and the learned scales: all that the default rule remembers.

What a :class:`bayesagg.units.Unit` holds is additive over data, but for the fading
``Λ ← exp(-n / N) Λ + H̃ᵀH̃`` for a batch of ``n`` data and a memory of ``N``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from bayesagg.checking import check, check_keys, scalar_leaf, tensor_leaf
from bayesagg.heads import Head, LossTask
from bayesagg.invariance import step_is_invariant
from bayesagg.units import Frame, Unit, load_unit

__all__ = ["FadingMemory", "Memory", "Update"]

_KEYS = ("units", "others", "length", "steps", "invariant", "due", "trial")  # of a checkpoint


class Memory(Protocol):
    """The state of a rule; nothing else of an engine learns. Members left out do nothing."""

    def commit(self, update: Any) -> None:
        """Take in what a step has found; its backward pass has run."""

    def stepped(self) -> dict[str, Tensor]:
        """The optimizer took a step; weights that heads receive now."""
        return {}

    def end_epoch(self) -> dict[str, Tensor]:
        """The end of an epoch, where the rule knows of any; weights that heads receive now."""
        return {}

    def met(self, optimizer: Optimizer) -> None:
        """The optimizer that takes the steps is known."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""

    def loaded(self, state: Any, device: torch.device) -> Memory:
        """A memory in the state of a checkpoint; this one is unchanged.

        Raises:
            CheckpointError: if the state does not fit.
        """


@dataclass
class Update:
    """What a step has found of the units that took part.

    Attributes:
        units: with the evidence of the step.
        others: scales of tasks without inference, ``[2]`` each.
        length: of aggregate and plain gradient, ``[2]``.
        steps: of the memory that the step saw.
        before: units that it saw, each with what its evidence was multiplied by.
        decay: of the running means of units, ``[5, 1]``.
        due: of :func:`bayesagg.rules.handover.next_due`.
        trial: of :func:`bayesagg.rules.handover.compared`, ``[3]``.
    """

    units: list[Unit] = field(default_factory=list)
    others: dict[str, Tensor] = field(default_factory=dict)
    length: Tensor | None = None
    steps: int = 0
    before: list[tuple[Unit, Tensor | float]] = field(default_factory=list)
    decay: Tensor | float = 1.0
    due: int | None = None
    trial: Tensor | None = None


class FadingMemory(Memory):
    """The state of :class:`bayesagg.rules.LikelihoodRule`.

    Args:
        tasks: heads, and losses without one, by name.
        dtype: of the evidence.
        counting: whether its units find out how many data there are.

    Attributes:
        units: evidence of all heads that were seen.
        others: scales of tasks without inference.
        length: running squared lengths of the aggregate and of the plain gradient, ``[2]``.
        steps: backward passes so far.
        invariant: whether the optimizer's step does not depend on the scale of the gradient.
        due: steps after which the warm-up may end; ``None``: it is over, and the rule at work.
        trial: how far posterior heads are behind those of the warm-up, ``[3]``, or ``None``.
        frames: of stacks of units, which the rule makes once; no state.
    """

    def __init__(
        self, tasks: Mapping[str, Head | LossTask], dtype: torch.dtype, counting: bool
    ) -> None:
        self.tasks, self.dtype, self.counting = dict(tasks), dtype, counting
        self.heads = {name: head for name, head in tasks.items() if isinstance(head, Head)}
        self.units: list[Unit] = []
        self.others: dict[str, Tensor] = {}
        self.length: Tensor | None = None
        self.steps, self.invariant = 0, False
        self.due: int | None = 0
        self.trial: Tensor | None = None
        self.frames: dict[tuple[object, ...], Frame] = {}
        self._zero = torch.zeros((), dtype=dtype)

    def zero(self, device: torch.device) -> Tensor:
        """A number of the evidence's dtype; it is not to be changed.

        Where no task has a head, a checkpoint does not know the device: its scales follow here.
        """
        if self._zero.device != device:
            self._zero = self._zero.to(device)
            self.others = {name: value.to(device) for name, value in self.others.items()}
            self.length = None if self.length is None else self.length.to(device)
        return self._zero

    def commit(self, update: Update) -> None:
        """Take in what a step has found; its backward pass has run."""
        if update.steps != self.steps:  # two scalars, and one backward pass for both
            update = self._merged(update)
        taken = {name for unit in update.units for name in unit.names}
        self.units = [u for u in self.units if not taken.intersection(u.names)] + update.units
        self.others.update(update.others)
        self.length, self.trial = update.length, update.trial
        self.steps += 1
        if self.due is not None:  # an earlier scalar may be the later one to run
            self.due = update.due

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

    def met(self, optimizer: Optimizer) -> None:
        """The optimizer that takes the steps is known."""
        self.invariant = step_is_invariant(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""
        return {
            "units": [unit.state_dict() for unit in self.units],
            "others": {name: value.clone() for name, value in self.others.items()},
            "length": None if self.length is None else self.length.clone(),
            "steps": self.steps,
            "invariant": self.invariant,
            "due": self.due,
            "trial": None if self.trial is None else self.trial.clone(),
        }

    def loaded(self, state: Any, device: torch.device) -> FadingMemory:
        """A memory in the state of a checkpoint; this one is unchanged.

        Raises:
            CheckpointError: if any part of the state does not fit these tasks.
        """
        check_keys(state, _KEYS, "the default rule's memory")
        memory = type(self)(self.tasks, self.dtype, self.counting)
        memory.steps = scalar_leaf(state["steps"], int, "the number of steps", minimum=0)
        memory.invariant = scalar_leaf(state["invariant"], bool, "the mark of the optimizer")
        due = state["due"]
        memory.due = None if due is None else scalar_leaf(due, int, "the end of the warm-up", 0)
        like = torch.zeros(0, dtype=self.dtype, device=device)
        if state["trial"] is not None:
            memory.trial = tensor_leaf(state["trial"], (3,), like, "the trial of the heads")
        check(isinstance(state["units"], list), "the units of evidence are not a list")
        seen: set[str] = set()
        for part in state["units"]:
            unit = load_unit(part, self.heads, self.counting, like)
            check(not seen.intersection(unit.names), f"task {unit.names[0]!r} has evidence twice")
            seen.update(unit.names)
            memory.units.append(unit)
        check(isinstance(state["others"], dict), "the scales of losses are not a dict")
        for name, value in state["others"].items():
            check(name in self.tasks, f"it has the scale of a task {name!r} that is not known here")
            memory.others[name] = tensor_leaf(value, (2,), like, f"task {name!r}: the scale")
        check((state["length"] is None) == (memory.steps == 0), "the running lengths are missing")
        if state["length"] is not None:
            memory.length = tensor_leaf(state["length"], (2,), like, "the running lengths", 0.0)
        return memory

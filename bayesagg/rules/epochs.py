"""Evidence by epochs, or fading until the first one ends: all that the paper's rule remembers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bayesagg.checking import check, check_keys, scalar_leaf
from bayesagg.heads import Head
from bayesagg.likelihoods import Evidence
from bayesagg.memory import Memory
from bayesagg.posterior import Gaussian
from bayesagg.rules.base import Tasks
from bayesagg.rules.groups import Group, State

__all__ = ["WARMUP", "PaperMemory", "Update", "default_memory"]

WARMUP = 50  # backward passes of linear scalarization, where nobody tells of epochs
_COUNTERS = ("epoch", "steps", "passes", "draws")
_GROUP = {"tasks", "full", "running", "faded", "scale"}


def default_memory(width: int, batch: Tensor) -> Tensor:
    """N, the data after which evidence has faded to 1/e; ``batch``: labels in a batch, a scalar."""
    return (10 * batch).clamp(min=10 * width)


@dataclass(frozen=True)
class Update:
    """What a batch, of all ranks, adds.

    Attributes:
        evidence: of every group; none where it is of no use yet.
        squares: of every group, as of :meth:`bayesagg.likelihoods.Likelihood.squares`.
        owning: heads whose losses are not their likelihood.
        totals: the evidence together with the prior of the step, if that was found.
        draws: of the memory that the step saw.
    """

    evidence: Sequence[Evidence] = ()
    squares: Sequence[Tensor | None] = ()
    owning: Collection[str] = ()
    totals: Sequence[Evidence] = ()
    draws: int = 0


@dataclass(eq=False)
class PaperMemory(Memory):
    """The state of :class:`bayesagg.rules.PaperRule`.

    Attributes:
        tasks: all, by name.
        groups: of heads.
        dtype: of the evidence.
        seed: of the first step's samples.
        pretrain_epochs: epochs of linear scalarization.
        steps_per_epoch: optimizer steps in an epoch; ``None``: evidence fades until
            :meth:`end_epoch` is called.
        states: of the groups.
        owning: heads whose losses have turned out not to be their likelihood.
        epoch: epochs completed.
        steps: optimizer steps of this epoch.
        passes: backward passes of this epoch.
        draws: backward passes so far.
        pending: there was a backward pass since the last step.
    """

    tasks: Tasks
    groups: Sequence[Group]
    dtype: torch.dtype
    seed: int
    pretrain_epochs: int
    steps_per_epoch: int | None
    states: list[State] = field(default_factory=list)
    owning: frozenset[str] = frozenset()
    epoch: int = 0
    steps: int = 0
    passes: int = 0
    draws: int = 0
    pending: bool = False

    def __post_init__(self) -> None:
        self.states = self.states or [State() for _ in self.groups]

    @cached_property
    def heads(self) -> dict[str, Head]:
        """All, by name."""
        return {name: head for group in self.groups for name, head in group.heads.items()}

    @property
    def fades(self) -> bool:
        """Nobody has told of epochs."""
        return self.steps_per_epoch is None and self.epoch == 0

    @property
    def pretraining(self) -> bool:
        """Whether steps are still those of linear scalarization."""
        if self.fades:
            return self.pretrain_epochs > 0 and self.draws < WARMUP
        return self.epoch < self.pretrain_epochs

    @property
    def written(self) -> bool:
        """Whether heads have received posterior means."""
        if self.fades:
            return self.draws > (WARMUP if self.pretrain_epochs else 0)
        return self.epoch >= max(1, self.pretrain_epochs)

    @property
    def collects(self) -> bool:
        """Whether evidence is of use: from the last epoch of pre-training on."""
        return self.fades or self.epoch + 1 >= self.pretrain_epochs

    def spared(self, owning: Collection[str] = ()) -> tuple[str, ...]:
        """Heads whose weights the posterior sets; ``owning``: those of a batch that it does not."""
        aside = self.owning.union(owning)
        found = (n for group in self.groups for n in group.inferred if n not in aside)
        return tuple(name for name in found if self.heads[name].writable)

    def totals(self, evidence: Sequence[Evidence]) -> list[Evidence]:
        """The prior of every group together with the evidence of a batch."""
        found = []
        for group, state, new in zip(self.groups, self.states, evidence, strict=True):
            prior = state.full
            if self.fades and state.faded is not None:
                memory = default_memory(group.likelihood.width, new.count.amax())
                prior = state.faded.scaled((-new.count / memory).exp(), len(new.precision) == 1)
            found.append(new if prior is None else prior + new)
        return found

    def posteriors(
        self, totals: Sequence[Evidence], update: Update | None = None
    ) -> list[Gaussian]:
        """Of every group, at the learned scales before the update."""
        found = []
        for i, (group, state, total) in enumerate(
            zip(self.groups, self.states, totals, strict=True)
        ):
            learned = None
            if group.learns:
                squares, count = None, total.count
                if update is not None:
                    squares, count = update.squares[i], update.evidence[i].count
                learned = state.learned(squares, count)
            found.append(group.posterior(total, learned))
        return found

    def read_out(
        self,
        posteriors: Sequence[Gaussian],
        totals: Sequence[Evidence],
        owning: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Posterior means for the heads that receive them: those of which there is evidence."""
        spared, found = self.spared(owning), {}
        for group, posterior, total in zip(self.groups, posteriors, totals, strict=True):
            names = [name for name in group.inferred if name in spared]
            if names:
                means, counts = group.means(posterior), total.count.tolist()
                found.update({n: means[n] for n in names if min(counts[group.slices[n]]) > 0})
        return found

    @torch.no_grad()
    def commit(self, update: Update) -> None:
        """Take in what a step has found; its backward pass has run."""
        totals = None
        if self.fades and update.evidence:
            current = update.totals if update.draws == self.draws else ()
            totals = current or self.totals(update.evidence)
        self.draws += 1
        self.passes += 1
        self.pending = True
        self.owning = self.owning.union(update.owning)
        for i, (new, squares) in enumerate(zip(update.evidence, update.squares, strict=True)):
            old = self.states[i]
            self.states[i] = State(
                old.full,
                new if old.running is None else old.running + new,
                None if totals is None else totals[i],
                old.moved(squares, new.count),
            )

    def stepped(self) -> dict[str, Tensor]:
        """The optimizer took a step: one of the epoch, where a backward pass led to it."""
        if not self.pending:
            return {}
        self.pending = False
        self.steps += 1
        if self.steps_per_epoch is None or self.steps < self.steps_per_epoch:
            return {}
        return self.end_epoch()

    @torch.no_grad()
    def end_epoch(self) -> dict[str, Tensor]:
        """This epoch's evidence becomes the prior of the next; weights that heads receive.

        A task without a single label in the epoch keeps the evidence it had. An epoch without any
        backward pass counts for nothing.
        """
        self.steps, self.pending = 0, False
        if self.passes == 0:
            return {}
        self.passes = 0
        self.epoch += 1
        self.states = [state.end_epoch() for state in self.states]
        known = [state.full for state in self.states if state.full is not None]
        if self.pretraining or len(known) < len(self.states):
            return {}
        return self.read_out(self.posteriors(known), known)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""
        return {
            **{key: getattr(self, key) for key in _COUNTERS},
            "pending": self.pending,
            "owning": sorted(self.owning),
            "groups": [
                {"tasks": list(group.heads), **state.plain()}
                for group, state in zip(self.groups, self.states, strict=True)
            ],
        }

    def loaded(self, state: Any, device: torch.device) -> PaperMemory:
        """A memory in the state of a checkpoint; this one is unchanged.

        Raises:
            CheckpointError: if any part of the state does not fit these heads and settings.
        """
        check_keys(state, (*_COUNTERS, "pending", "owning", "groups"), "the paper's memory")
        pending = scalar_leaf(state["pending"], bool, "the mark of a pending step")
        owning, parts = state["owning"], state["groups"]
        check(
            isinstance(owning, list) and all(name in list(self.heads) for name in owning),
            "the heads with losses of their own are not a list of known heads",
        )
        check(
            isinstance(parts, list)
            and all(isinstance(part, dict) and part.keys() == _GROUP for part in parts),
            "the evidence of the heads is incomplete",
        )
        saved, own = [part["tasks"] for part in parts], [list(g.heads) for g in self.groups]
        check(
            saved == own,
            f"it has evidence of the tasks {saved}, here {own} are computed together (heads that "
            f"differ in `moments` or `num_samples` are computed apart)",
        )
        like = torch.zeros((), dtype=self.dtype, device=device)
        pairs = zip(parts, self.groups, strict=True)
        states = [State.read(part, group, like) for part, group in pairs]
        memory = replace(self, states=states, owning=frozenset(owning), pending=pending)
        for key in _COUNTERS:
            setattr(memory, key, scalar_leaf(state[key], int, f"the counter {key!r}", 0))
        return memory

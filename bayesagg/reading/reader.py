"""From losses to labels: one pass of autograd, and one look at the device if all is well."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bayesagg.heads import Head, LossTask
from bayesagg.parallel import without_gathers
from bayesagg.reading.batch import Batch, Labels, Part
from bayesagg.reading.check import (
    check_affine,
    check_own_weights,
    check_size,
    hooks_of,
    warn_of_other_losses,
)
from bayesagg.reading.diagnose import overflowed, raise_invalid, unreached
from bayesagg.reading.form import form_of
from bayesagg.reading.hooks import Call, Capture
from bayesagg.reading.hot import Factors, look, read_group
from bayesagg.reading.known import Known, load, state
from bayesagg.reading.losses import named_losses, named_targets, raise_not_finite, reduced
from bayesagg.reading.observed import Layout, Said
from bayesagg.reading.step import Features, Group, group_heads, labels_of, make_parts
from bayesagg.reading.verify import Verified, verify

__all__ = ["Reader"]


class Reader:
    """Reads labels off losses, and remembers what it has verified of them.

    Args:
        tasks: heads, and losses without one, by name.
        passthrough: further losses without a head.
        keeping: heads that keep their own gradient, whatever their losses are.

    Attributes:
        known: the form of every task's loss.
    """

    def __init__(
        self,
        tasks: Mapping[str, Head | LossTask],
        passthrough: Iterable[str] = (),
        keeping: Iterable[str] = (),
    ) -> None:
        self.tasks, self.passthrough = dict(tasks), frozenset(passthrough)
        self._keeping = frozenset(keeping)
        self.known: dict[str, Known] = {}
        self._new: dict[str, Known] = {}
        self._factors = Factors()
        # Hooks that heads had when they were looked at.
        self._checked: dict[str, tuple[int, ...]] = {}
        self._layouts = {
            name: Layout.of(head) for name, head in self.tasks.items() if isinstance(head, Head)
        }
        # Losses without a head that were in no step yet.
        self._unheard = self.passthrough.union(self.tasks) - self._layouts.keys()

    def state_dict(self) -> dict[str, Any]:
        """What was verified, as plain dictionaries."""
        return state(self.known)

    def loaded(self, saved: Any) -> Reader:
        """A reader of the same tasks in the state of a checkpoint; this one is unchanged.

        Raises:
            CheckpointError: if the state does not fit.
        """
        reader = Reader(self.tasks, self.passthrough, self._keeping)
        reader.known = load(saved, self.tasks)
        return reader

    def read(
        self,
        capture: Capture,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    ) -> Batch:
        """Check everything that a step is given, and read the labels.

        Args:
            capture: that saw the forward pass.
            losses: by task.
            targets: by task, where they are known.

        Raises:
            BayesAggError: a specific subclass for each kind of bad input; then nothing has changed.
        """
        named = named_losses(losses, self.tasks, self.passthrough)
        given = named_targets(targets, self.tasks, named)
        names = [name for name in named if name in self._layouts]
        capture.check(names)
        scalars = reduced(named)
        total = next(iter(scalars.values()))
        for loss in list(scalars.values())[1:]:
            total = total + loss
        calls = {name: capture.calls[name] for name in names}
        outputs = [call.output for some in calls.values() for call in some]
        hooked = any([output._backward_hooks for output in outputs])
        with without_gathers(outputs) if hooked else nullcontext():
            saids = self._hear(capture, calls, scalars, total, given)
            parts = self._parts(saids, named, scalars, total)
        if new := self._unheard.intersection(scalars):
            self._unheard -= new
            first = {name: loss for name, loss in scalars.items() if name in new}
            warn_of_other_losses(first, self._set_heads(capture.heads), capture)
        alone = frozenset(said.name for said in saids if said.alone)
        return Batch(parts or [], total, scalars, names, parts is None, alone)

    def _set_heads(self, heads: Mapping[str, Head]) -> dict[str, Head]:
        """Heads that a posterior sets, by what is known of their losses."""
        known = {**self.known, **self._new}
        return {
            name: head
            for name, head in heads.items()
            if name in known and not (known[name].own or name in self._keeping)
        }

    def _hear(
        self,
        capture: Capture,
        calls: Mapping[str, Sequence[Call]],
        scalars: Mapping[str, Tensor],
        total: Tensor,
        targets: Mapping[str, Tensor],
    ) -> list[Said]:
        """Derivatives of all losses at the outputs of all heads, in one pass.

        Raises:
            LossError: for a head whose output no loss depends on.
            FeatureError: if features or outputs were modified in place.
        """
        outputs = [call.output for some in calls.values() for call in some]
        found: Sequence[Tensor | None] = (
            torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)
            if outputs
            else ()
        )
        gradients, nodes = iter(found), {output.grad_fn for output in outputs}
        saids = []
        for name, some in calls.items():
            reached, derivatives, own = [], [], []
            for call in some:
                gradient = next(gradients)
                if gradient is not None:
                    reached.append(call)
                    derivatives.append(gradient)
                    own.append(call.output.grad_fn)
            if not reached:
                raise unreached(name)
            head, loss = self.tasks[name], scalars[name]
            assert isinstance(head, Head)
            capture.check_unchanged(name, reached)
            form = form_of(loss, own, nodes)
            eps = _eps(reached[0].output.dtype, loss.dtype)
            layout, target = self._layouts[name], targets.get(name)
            saids.append(Said(name, head, layout, reached, loss, derivatives, target, eps, *form))
            check_size(saids[-1])
        return saids

    def _parts(
        self,
        saids: Sequence[Said],
        named: Mapping[str, Tensor],
        scalars: Mapping[str, Tensor],
        total: Tensor,
    ) -> list[Part] | None:
        """Parts of all heads; ``None``: gradients overflowed.

        Raises:
            BayesAggError: as of :meth:`read`.
        """
        features = Features()
        with torch.no_grad():
            groups = group_heads(saids, self.known)
            for said in saids:
                features.of(said)
            for group in groups:
                read_group(group, self._factors)
            if not look(groups, features, total):
                raise_not_finite(named)
                if overflowed(saids):
                    return None
                raise_invalid(groups, features)
            unread = [group for group in groups if group.read is None and not group.own]
            self._check_heads(groups, saids, features)
            with torch.enable_grad() if unread else nullcontext():
                verified = verify(unread, saids, scalars, total, self.known) if unread else {}
            parts = [part for group in groups for part in _made(group, verified, features)]
        self._remember(groups, verified)
        return parts

    def _check_heads(
        self, groups: Sequence[Group], saids: Sequence[Said], features: Features
    ) -> None:
        """Look once at heads that something is inferred from, and again when hooks have changed.

        Raises:
            HeadError: for one that is not linear in what it receives, or shares its weights.
        """
        some = [said for group in groups if not group.own for said in group.saids]
        new = [said for said in some if self._checked.get(said.name) != hooks_of(said.head)]
        for said in new:
            check_affine(said, features.of(said))
        if new:
            own = [said for said in new if said.name not in self._keeping]
            check_own_weights(own, {output.grad_fn for said in saids for output in said.outputs})
            self._checked.update((said.name, hooks_of(said.head)) for said in new)

    def _remember(self, groups: Sequence[Group], verified: Mapping[str, Verified]) -> None:
        """Keep what was found for :meth:`take`."""
        self._new = {}
        for group in groups:
            if group.read is None or group.read.present is None:
                continue
            for name, known, complete in zip(group.names, group.known, group.complete, strict=True):
                if known is not None and not complete and not known.masked:
                    self._new[name] = replace(known, masked=True)
        for name, found in verified.items():
            if found.known is None:
                continue
            before = self.known.get(name)
            if found.known.own and (before is None or not before.own):
                _announce(name)
            self._new[name] = found.known

    def take(self) -> dict[str, Known]:
        """What the last reading has verified; it counts once its backward pass has run."""
        new, self._new = self._new, {}
        return new


@cache
def _eps(output: torch.dtype, loss: torch.dtype) -> float:
    """The larger rounding of two dtypes."""
    return max(torch.finfo(output).eps, torch.finfo(loss).eps)


def _announce(name: str) -> None:
    """Say once that nothing is inferred from a loss: it may be a mistake."""
    warnings.warn(
        f"task {name!r}: its loss is not the likelihood of its head. Nothing is inferred from it: "
        f"the head keeps its own gradient, and what it sends to its features is weighed by the "
        f"mean of the loss. If it was meant to be: `targets` are what it compares with, with label "
        f"smoothing the smoothed probabilities.",
        stacklevel=5,
    )


def _made(group: Group, verified: Mapping[str, Verified], features: Features) -> list[Part]:
    """Parts of a group that was read, verified or has no labels."""
    read = group.read
    if group.own:
        return make_parts(group, None, features)
    anew = verified and not verified.keys().isdisjoint(group.names)
    if read is not None and len(set(group.complete)) == 1 and not anew:
        whole = group.complete[0]
        return make_parts(group, labels_of(group.observed, read, whole), features)
    labels: list[Labels | None] = []
    start = 0
    for i, said in enumerate(group.saids):
        stop = start + said.layout.tasks
        if said.name in verified:
            labels.append(verified[said.name].labels)
        else:
            assert read is not None
            together = labels_of(group.observed, read, group.complete[i])
            labels.append(together.columns(start, stop))
        start = stop
    return make_parts(group, labels, features)

"""Losses that are not the likelihood of their heads: why, and whether that may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesagg.errors import LossError, TargetError
from bayesagg.reading.given import points_away
from bayesagg.reading.observed import Said, join
from bayesagg.reading.step import Features, Group

__all__ = ["diagnose", "overflowed", "raise_invalid", "unreached"]


def diagnose(
    failing: Sequence[Group], saids: Sequence[Said], losses: Mapping[str, Tensor]
) -> set[str]:
    """Heads that go by the gradient of their own loss from now on.

    Args:
        failing: heads whose losses are not the likelihood, each a group by itself.
        saids: all heads of the step.
        losses: all losses of the step, scalars.

    Raises:
        LossError: for a head without targets.
        TargetError: for targets that are not those of the loss.
    """
    reach = {name: _reached(loss, saids) for name, loss in losses.items()}
    names = [group.saids[0].name for group in failing]
    for name in names:
        if name not in reach[name]:
            raise unreached(name)
    given = {said.name for said in saids if said.target is not None}
    own: set[str] = set()
    for group in failing:
        name = group.saids[0].name
        others = [n for n in losses if n != name and (name in reach[n] or n in reach[name])]
        if others:
            own |= _coupled(name, others, reach, given)
        else:
            _alone(group)
            own.add(name)
    return own


def _reached(loss: Tensor, saids: Sequence[Said]) -> set[str]:
    """Heads at whose outputs a loss has a derivative."""
    outputs = [call.output for said in saids for call in said.calls]
    found = iter(torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True))
    reached = set()
    for said in saids:
        some = [next(found) for _ in said.calls]
        if any(g is not None and bool((g != 0).any()) for g in some):
            reached.add(said.name)
    return reached


def _coupled(
    name: str, others: Sequence[str], reach: Mapping[str, set[str]], given: set[str]
) -> set[str]:
    """Heads whose outputs share a loss.

    Raises:
        LossError: if one of them has no targets.
    """
    heads = {name} | {other for other in others if other in reach[name] or other in reach[other]}
    missing = [head for head in (name, *others) if head in heads and head not in given]
    if not missing:
        return heads
    other = others[0]
    loss, head = (name, other) if other in reach[name] else (other, name)
    needed = ", ".join(map(repr, missing))
    raise LossError(
        f"task {loss!r}: its loss depends on the output of the head of task {head!r} as well (a "
        f"product of probabilities, a consistency term?), so that the labels of neither can be "
        f"read off their losses. Pass `targets=` for {needed}: the heads are then trained by the "
        f"gradients of the losses themselves. Or make them LossTask() in `heads`."
    )


def _alone(group: Group) -> None:
    """A loss that is not the likelihood, of one head and no other.

    Raises:
        LossError: if the head has no targets.
        TargetError: if its targets are not those of the loss.
    """
    said, likelihood, observed = group.saids[0], group.likelihood, group.observed
    if said.target is None:
        if not said.probes:
            raise LossError(
                f"task {said.name!r}: its loss cannot be differentiated twice, which reading its "
                f"labels takes (a compiled loss, a function of your own): leave the loss out of "
                f"torch.compile, or pass `targets=`."
            )
        raise LossError(
            f"task {said.name!r}: its loss is not {likelihood.loss_name}, so its labels cannot be "
            f"read off it. Likely causes: {likelihood.hints}. For another loss, or weights, pass "
            f"`targets=`; make a regulariser a loss of its own (passthrough=); or make the task a "
            f"LossTask() in `heads`: its head is then not inferred."
        )
    with torch.no_grad():
        if points_away(likelihood, observed):
            raise TargetError(
                f"task {said.name!r}: the gradient of its loss points away from `targets`: they "
                f"are not the labels this loss was computed with (with label smoothing the "
                f"smoothed probabilities), or it does not decrease towards them: make it a "
                f"LossTask() then."
            )
        if observed.probes and bool(likelihood.recover_any(join(group.saids)).valid.all()):
            raise TargetError(
                f"task {said.name!r}: its loss is {likelihood.loss_name}, but its gradient points "
                f"away from `targets` to other labels. {likelihood.other_labels}"
            )


def unreached(name: str) -> LossError:
    """The error of a loss that does not belong to the head it is given for."""
    return LossError(
        f"task {name!r}: its loss does not depend on the output of its head in the last forward "
        f"pass. Pass the loss of that pass under the name of the right head."
    )


def overflowed(saids: Sequence[Said]) -> bool:
    """Whether a gradient is infinite; looks at the device.

    Raises:
        LossError: for a gradient that is NaN.
    """
    infinite = False
    for said in saids:
        for gradient in said.gradients:
            if bool(gradient.isnan().any()):
                raise LossError(
                    f"task {said.name!r}: its loss is finite but its gradient is NaN: probably a "
                    f"missing label hidden by torch.where. Index outputs and labels with the mask "
                    f"instead, as in loss_fn(z[known], y[known])."
                )
            infinite |= not bool(gradient.isfinite().all())
    return infinite


def raise_invalid(groups: Sequence[Group], features: Features) -> None:
    """Name what is wrong with features or targets; looks at the device.

    Raises:
        FeatureError, TargetError: if something is.
    """
    features.raise_not_finite()
    for group in groups:
        if group.usable is not None and not bool(group.usable):
            for said in group.saids:
                group.likelihood.raise_invalid(said)

"""Losses and targets as they are passed: by name, differentiable, reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from bayesagg.errors import LossError, TargetError, UnknownTaskError
from bayesagg.heads import Head, LossTask

__all__ = ["named_losses", "named_targets", "raise_not_finite", "reduced"]


def named_losses(
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    tasks: Mapping[str, Head | LossTask],
    passthrough: Set[str],
) -> dict[str, Tensor]:
    """Losses by name; a sequence has one for every task, in their order.

    Raises:
        UnknownTaskError: for a name without a task.
        LossError: for a wrong number of losses, none, or one that is not a tensor or cannot be
            differentiated.
    """
    named = _by_name(losses, list(tasks), "losses", LossError)
    for name, loss in named.items():
        if name not in tasks and name not in passthrough:
            known = ", ".join(map(repr, tasks))
            raise UnknownTaskError(
                f"`losses` has a task {name!r} without a head; heads: {known}. If it is a loss "
                f"without a head to infer, name it in passthrough=({name!r},), or give it a "
                f"weight of its own by heads={{..., {name!r}: LossTask()}}."
            )
        if not loss.requires_grad:
            raise LossError(
                f"task {name!r}: its loss does not require gradients: it was detached, or "
                f"computed under torch.no_grad(). Pass the loss itself."
            )
    if not named:
        raise LossError("`losses` is empty: pass the loss of at least one task.")
    return named


def named_targets(
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
    tasks: Mapping[str, Head | LossTask],
    losses: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Targets by name; those of losses without a head are of no use and left out.

    Raises:
        UnknownTaskError: for a name without a task, or without a loss in this step.
        TargetError: for a wrong number of targets, or one that is not a tensor.
    """
    if targets is None:
        return {}
    heads = [name for name, head in tasks.items() if isinstance(head, Head)]
    named = _by_name(targets, heads, "targets", TargetError)
    for name in named:
        if name not in losses:
            if name in tasks:
                raise UnknownTaskError(
                    f"`targets` has a task {name!r} that has no loss in this step: pass both, or "
                    f"neither."
                )
            known = ", ".join(map(repr, tasks))
            raise UnknownTaskError(
                f"`targets` has a task {name!r} without a head; heads: {known}. Leave it out."
            )
    return {
        name: target.detach() if target.requires_grad else target
        for name, target in named.items()
        if name in heads
    }


def _by_name(
    values: Mapping[str, Tensor] | Sequence[Tensor],
    names: Sequence[str],
    what: str,
    error: type[LossError] | type[TargetError],
) -> dict[str, Tensor]:
    if isinstance(values, Mapping):
        named = dict(values)
    elif isinstance(values, Sequence) and len(values) == len(names):
        named = dict(zip(names, values, strict=True))
    elif isinstance(values, Sequence) and not values and what == "targets":
        return {}
    else:
        got = f"{len(values)} of them" if isinstance(values, Sequence) else type(values).__name__
        raise error(
            f"`{what}` must be a mapping from task to tensor, or a sequence with one tensor per "
            f"task ({len(names)}), got {got}. Use a mapping to leave tasks out."
        )
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise error(f"task {name!r}: `{what}` must hold tensors, got {type(value).__name__}.")
    return named


def reduced(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars: means of losses that were not reduced."""
    return {name: loss if loss.dim() == 0 else loss.mean() for name, loss in losses.items()}


def raise_not_finite(losses: Mapping[str, Tensor]) -> None:
    """Name the loss that is not finite; looks at the device for each.

    Raises:
        LossError: if there is one.
    """
    for name, loss in losses.items():
        if not bool(loss.detach().isfinite().all()):
            raise LossError(
                f"task {name!r}: its loss is not finite. Leave missing labels out of it by a mask, "
                f"and a task without any out of the step; check inputs and labels, or lower the "
                f"learning rate."
            )

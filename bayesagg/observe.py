"""What the losses say at the heads' outputs: first and second derivatives, from loss to output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bayesagg.capture import flatten
from bayesagg.errors import LossError, TargetError, UnknownTaskError
from bayesagg.heads import Head
from bayesagg.likelihoods import BLOCKS, Observation

__all__ = ["by_task", "check_finite", "observe"]


def by_task(
    values: Mapping[str, Tensor] | Sequence[Tensor],
    heads: Mapping[str, Head],
    what: str,
    expected: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Losses or targets by name.

    Raises:
        UnknownTaskError: for a name without a head, or a target without a loss.
        LossError, TargetError: for a wrong number of entries, or one that is not a tensor.
    """
    error = LossError if what == "losses" else TargetError
    if isinstance(values, Mapping):
        named = dict(values)
    elif isinstance(values, Sequence) and len(values) == len(heads):
        named = dict(zip(heads, values, strict=True))
    else:
        got = f"{len(values)} of them" if isinstance(values, Sequence) else type(values).__name__
        raise error(
            f"`{what}` must be a mapping from task to tensor, or a sequence with one tensor per "
            f"head ({len(heads)}), got {got}. Use a mapping to leave tasks out."
        )
    for name, value in named.items():
        if name not in heads:
            known = ", ".join(map(repr, heads))
            raise UnknownTaskError(f"`{what}` has a task {name!r} without a head; heads: {known}.")
        if expected is not None and name not in expected:
            raise UnknownTaskError(f"`{what}` has a task {name!r} that has no loss in this step.")
        if not isinstance(value, Tensor):
            raise error(f"task {name!r}: `{what}` must hold tensors, got {type(value).__name__}.")
    if not named:
        raise error(f"`{what}` is empty: pass the loss of at least one task.")
    return named


def check_finite(losses: Mapping[str, Tensor]) -> None:
    """Every loss can be differentiated and is finite, also where it is not reduced.

    Raises:
        LossError: for a loss that is not finite or does not require gradients.
    """
    for name, loss in losses.items():
        if not loss.requires_grad:
            raise LossError(
                f"task {name!r}: its loss does not require gradients: it was detached, or "
                f"computed under torch.no_grad()."
            )
    values = [loss.detach() for loss in losses.values()]
    if all(value.dim() == 0 for value in values) and bool(torch.stack(values).sum().isfinite()):
        return  # one look at the device in the common case
    for name, loss in losses.items():
        if not bool(torch.isfinite(loss.detach()).all()):
            raise LossError(
                f"task {name!r}: its loss is not finite. Check its inputs and labels (mark "
                f"missing labels through `targets=` and a loss over the others), or lower the "
                f"learning rate."
            )


def observe(
    losses: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    channels_first: bool,
) -> dict[str, Observation] | None:
    """Derivatives of every loss at its head's output; two calls of autograd for all tasks.

    The losses are differentiated together: none reaches another task's output.

    Returns:
        by task, or ``None`` if a gradient overflowed although the loss is finite (a scaled loss
        under a ``GradScaler``).

    Raises:
        LossError: if a loss does not depend on its head's output, or is not twice differentiable
            where that is needed.
    """
    names = list(losses)
    curved = [
        name for name in names if name not in targets and BLOCKS[heads[name].kind].needs_curvature
    ]
    taken = [outputs[name] for name in names]
    gradients = torch.autograd.grad(
        list(losses.values()),
        taken,
        create_graph=bool(curved),
        retain_graph=True,
        allow_unused=True,
    )
    by_name = dict(zip(names, gradients, strict=True))
    for name, gradient in by_name.items():
        if gradient is None:
            raise LossError(
                f"task {name!r}: its loss does not depend on the output of its head in the last "
                f"forward pass. Pass the loss of that pass under the name of the right head."
            )
    if not _finite(by_name):
        return None
    curvatures = _second_derivatives({name: by_name[name] for name in curved}, outputs)
    observed = {}
    for name in names:
        target = targets.get(name)
        curvature = curvatures.get(name)
        observed[name] = Observation(
            output=flatten(outputs[name].detach(), channels_first),
            gradient=flatten(by_name[name].detach(), channels_first),
            curvature=None if curvature is None else flatten(curvature, channels_first),
            loss=losses[name].detach().view(1),
            target=None if target is None else _flat_target(target, outputs[name], channels_first),
        )
    return observed


def _finite(gradients: Mapping[str, Tensor]) -> bool:
    """Whether no gradient overflowed.

    Raises:
        LossError: for a gradient that is NaN.
    """
    with torch.no_grad():  # one look at the device in the common case
        together = torch.cat([gradient.reshape(-1) for gradient in gradients.values()])
        if bool(together.isfinite().all()):
            return True
    for name, gradient in gradients.items():
        if bool(gradient.isnan().any()):
            raise LossError(
                f"task {name!r}: its loss is finite but its gradient is NaN: probably a missing "
                f"label hidden by torch.where. Leave missing labels out of the loss by a mask, "
                f"or pass them as NaN through `targets=`."
            )
    return False


def _second_derivatives(
    gradients: dict[str, Tensor], outputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Row sums of the Hessian at each output, its diagonal for an elementwise loss."""
    smooth = {name: g for name, g in gradients.items() if g.requires_grad}
    if smooth:
        values = torch.autograd.grad(
            list(smooth.values()),
            [outputs[name] for name in smooth],
            [torch.ones_like(g) for g in smooth.values()],
            retain_graph=True,
            allow_unused=True,
        )
        found = dict(zip(smooth, values, strict=True))
    else:
        found = {}
    return {
        name: torch.zeros_like(g) if found.get(name) is None else found[name].detach()
        for name, g in gradients.items()
    }


def _flat_target(target: Tensor, output: Tensor, channels_first: bool) -> Tensor:
    """Targets as ``[N]`` (no channel dimension) or ``[N, c]``, beside the flattened output."""
    target = target.detach().to(output.device)
    if target.dim() < output.dim():
        return target.reshape(-1)
    return flatten(target, channels_first)

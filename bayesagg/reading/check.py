"""What a head does, looked at when its loss is verified: ``W h + b``, by weights of its own."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bayesagg.errors import HeadError
from bayesagg.heads import Head, stacked
from bayesagg.reading.hooks import Capture
from bayesagg.reading.observed import Said

__all__ = [
    "check_affine",
    "check_own_weights",
    "check_size",
    "hooks_of",
    "warn_of_other_losses",
]

_ROWS = 1 << 12  # data that are looked at; maps have many


def check_size(said: Said) -> None:
    """Whether a head is of the size that it had when it was wrapped.

    Raises:
        HeadError: if not.
    """
    head, call, axis = said.head, said.calls[0], 1 if said.layout.channels_first else -1
    sizes = call.features.shape[axis], call.output.shape[axis]
    own = head.linear._parameters
    bias = own["bias"] is not None if "bias" in own else head.has_bias  # or it is computed
    if (*sizes, bias) != (head.in_features, said.layout.outputs, head.has_bias):
        had, has = ("a" if there else "no" for there in (head.has_bias, bias))
        raise HeadError(
            f"task {said.name!r}: when it was wrapped, its head made {said.layout.outputs} outputs "
            f"of {head.in_features} features with {had} bias. Now it makes {sizes[1]} of "
            f"{sizes[0]} with {has} bias. Wrap the optimizer anew when a head has been changed."
        )


def hooks_of(head: Head) -> tuple[int, ...]:
    """Numbers of the hooks of a head, which may change what it does; no two hooks have one."""
    module = head.watched
    return (*module._forward_hooks, *module._forward_pre_hooks)


def check_affine(said: Said, features: Tensor) -> None:
    """Whether the outputs are those of weight and bias, which all that is inferred goes by.

    Args:
        said: of the head.
        features: that it received, ``[N, d]``.

    Raises:
        HeadError: if the head does something else.
    """
    head = said.head
    if head._sharded:  # to gather weights takes all ranks, of which some may lack the task
        return
    output = said.rows([call.output.detach() for call in said.calls])[:_ROWS]
    weights = stacked(head)
    wide = torch.promote_types(torch.promote_types(output.dtype, weights.dtype), torch.float32)
    h, weights = features[:_ROWS].to(wide), weights.to(wide)
    h = torch.cat([h, h.new_ones(len(h), head.has_bias)], 1)
    off = (output.to(wide) - h @ weights.mT).abs()
    # Rounding, that of the weights under autocast too.
    rounding = max(16 * torch.finfo(output.dtype).eps, 1e-2)
    if bool((off > rounding * (h.abs() @ weights.abs().mT)).any()):
        raise HeadError(
            f"task {said.name!r}: its head does not return `weight @ h + bias` of what it receives "
            f"(a forward() of its own, or a hook?). Move what comes in front or behind to layers "
            f"there, or into the loss; or make the task a LossTask() in `heads`: its head is then "
            f"not inferred."
        )


def check_own_weights(saids: Sequence[Said], outputs: Collection[Node | None]) -> None:
    """Whether weights that a posterior is to set are used nowhere below the heads.

    Args:
        saids: heads that a posterior sets.
        outputs: nodes of the outputs of all heads of the step.

    Raises:
        HeadError: if a head shares its weights with another layer, as with an embedding.
    """
    features = [call.features.grad_fn for said in saids for call in said.calls]
    for name in _owners_below(features, outputs, {said.name: said.head for said in saids}):
        raise HeadError(
            f"task {name!r}: the weights of its head are those of another layer too (tied to an "
            f"embedding?), which setting them to a posterior mean would spoil. Give the head "
            f"readout='gradient', or weights of its own."
        )


def warn_of_other_losses(
    losses: Mapping[str, Tensor], heads: Mapping[str, Head], capture: Capture
) -> None:
    """Say which losses without a head go to weights that a posterior sets, as forces do.

    Args:
        losses: by name.
        heads: that a posterior sets, by name.
        capture: that saw the forward pass.
    """
    outputs = [call.output.grad_fn for some in capture.calls.values() for call in some]
    for loss, value in losses.items():
        for name in dict.fromkeys(_owners_below([value.grad_fn], outputs, heads)):
            warnings.warn(
                f"task {name!r}: the weights of its head are in the loss {loss!r} too, whose "
                f"gradient at them has no effect: the labels of {name!r} set them. If that loss is "
                f"to shape them (forces, the derivative of an energy), give the head "
                f"readout='gradient'; a penalty on weights can stay.",
                stacklevel=6,
            )


def _owners_below(
    nodes: Iterable[Node | None], outputs: Collection[Node | None], heads: Mapping[str, Head]
) -> Iterator[str]:
    """Heads whose weights are in graphs, the outputs of heads aside."""
    owners = {
        id(parameter): name
        for name, head in heads.items()
        if head.writable
        for parameter in head.parameters()
    }
    seen: set[Node | None] = {None, *outputs}
    queue = [*nodes]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None and id(variable) in owners:
            yield owners[id(variable)]
        queue += [following for following, _ in node.next_functions]

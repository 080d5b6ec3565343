"""What a head does, looked at when its loss is verified: ``W h + b``, by weights of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from bayesagg.errors import HeadError
from bayesagg.heads import Head, stacked
from bayesagg.reading.observed import Said

__all__ = ["check_affine", "check_own_weights", "check_size", "hooks_of"]

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
    h, weights = features[:_ROWS].double(), stacked(head).double()
    h = torch.cat([h, h.new_ones(len(h), head.has_bias)], 1)
    off = (output.double() - h @ weights.mT).abs()
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
        saids: heads.
        outputs: nodes of the outputs of all heads of the step.

    Raises:
        HeadError: if a head shares its weights with another layer, as with an embedding.
    """
    owners = {
        id(parameter): said.name
        for said in saids
        if said.head.writable and said.head.readout != "gradient"
        for parameter in said.head.parameters()
    }
    seen: set[Node | None] = {None, *outputs}
    queue = [call.features.grad_fn for said in saids for call in said.calls]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None and id(variable) in owners:
            raise HeadError(
                f"task {owners[id(variable)]!r}: the weights of its head are those of another "
                f"layer too (tied to an embedding?), which setting them to a posterior mean would "
                f"spoil. Give the head readout='gradient', or weights of its own."
            )
        queue += [following for following, _ in node.next_functions]

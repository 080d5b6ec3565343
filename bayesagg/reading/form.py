"""The form of a loss: which operations lie between it and the outputs of heads."""

from __future__ import annotations

import zlib
from collections.abc import Container

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["form_of"]

_MANY = 64  # nodes: a loss that reaches into the network by other paths has thousands


def form_of(
    loss: Tensor, own: Container[Node | None], others: Container[Node | None]
) -> tuple[int, bool]:
    """A number that another composition of operations is all but sure to change.

    A loss that was verified is trusted as long as its form stays: a pool over outputs that was not
    there has the value, too, that its labels seem to give.

    Returns:
        the number, and whether the loss depends on the outputs of its head and on nothing else.

    Args:
        loss: a scalar with its graph.
        own: nodes of the outputs of its head.
        others: nodes of the outputs of all heads.
    """
    names: list[str] = []
    alone = True
    seen: set[Node] = set()
    queue = [loss.grad_fn]
    for node in queue:  # which grows meanwhile
        if node is None or node in seen:
            names.append("-")
        elif node in others:
            seen.add(node)
            own_one = node in own
            alone &= own_one
            names.append("own" if own_one else "other")
        else:
            seen.add(node)
            name = node.name()
            alone &= not name.endswith("AccumulateGrad")
            names.append(name)
            queue += [following for following, _ in node.next_functions]
        if len(names) == _MANY:
            break
    return zlib.crc32(" ".join(names).encode()), alone and len(names) == len(queue)

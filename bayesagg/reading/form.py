"""The form of a loss: which operations lie between it and the outputs of heads."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Container, Iterable

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["form_of", "nodes_of"]

_MANY = 64  # nodes: a loss that reaches into the network by other paths has thousands


def nodes_of(outputs: Iterable[Tensor]) -> set[Node]:
    """The nodes of tensors that have one."""
    return {output.grad_fn for output in outputs if output.grad_fn is not None}


def form_of(loss: Tensor, own: Container[Node], others: Container[Node]) -> tuple[int, bool]:
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
    queue = deque([loss.grad_fn])
    while queue and len(names) < _MANY:
        node = queue.popleft()
        if node is None or node in seen:
            names.append("-")
            continue
        seen.add(node)
        if node in others:
            names.append("own" if node in own else "other")
            alone &= names[-1] == "own"
            continue
        names.append(node.name())
        alone &= not names[-1].endswith("AccumulateGrad")
        queue.extend(following for following, _ in node.next_functions)
    return zlib.crc32(" ".join(names).encode()), alone and not queue

"""What a step's data add to the memory: sums over the data of all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.parallel import Exchange
from bayesagg.repeats import fingerprints, make_marks, matches
from bayesagg.rules.stack import Stack

__all__ = ["Evidence", "evidence_of"]


@dataclass
class Evidence:
    """Sums over the data of a step.

    Attributes:
        gram: ``Σ w h̃h̃ᵀ``, ``[G, D, D]``.
        shift: ``Σ w t h̃``, ``[G, P, D]``.
        misfit: ``Σ w misfit``, ``[G, T]``, or of fewer tasks; at the start also ``Σ w y²``.
        seen: ``Σ w``, ``[G]``, or the number of data where no label is missing on one rank.
        squares: ``Σ w (h̃ᵀQ)²``, ``[G, D]``, in a basis that is kept; ``None``: it is not.
        marks: fingerprints for them, ``[G, n]``, or what is met of them, ``[G, n, 3]``; ``None``:
            nobody asks.
    """

    gram: Tensor
    shift: Tensor
    misfit: Tensor
    seen: Tensor | float
    squares: Tensor | None
    marks: Tensor | None = None

    def over(self) -> Iterator[Tensor]:
        """What ranks add up, in a fixed order."""
        return (part for part in self._parts() if isinstance(part, Tensor))

    def replaced(self, sums: Iterator[Tensor]) -> Evidence:
        """With the sums over ranks in place of this rank's."""
        return Evidence(*(next(sums) if isinstance(p, Tensor) else p for p in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Tensor | float | None, ...]:
        return self.gram, self.shift, self.misfit, self.seen, self.squares, self.marks


def evidence_of(stack: Stack, dtype: torch.dtype, exchange: Exchange) -> Evidence:
    """Of this rank's data, in a dtype."""
    sums: list[Tensor] = []
    vectors = stack.kept_vectors(dtype)
    for rows in stack.chunks():
        h, t = stack.features(rows, dtype), stack.of(stack.responses, rows)
        weights = None if stack.weights is None else stack.of(stack.weights, rows)
        weighted = h if weights is None else h * weights
        new = [weighted.mT.bmm(h), t.mT.bmm(weighted)]
        if vectors is not None:
            rotated = stack.rotated(rows, dtype, vectors)
            squares = rotated * rotated
            new.append((squares if weights is None else squares * weights).sum(1, dtype=dtype))
        sums = [old + one for old, one in zip(sums, new, strict=True)] if sums else new
    gram, shift, *rest = sums
    total, seen = stack.misfit, float(stack.responses.shape[1])
    if not stack.units[0].started and stack.exact:  # and the level of the labels
        total = torch.cat([total, stack.responses[:, :, : stack.exact].square()], 2)
    if stack.weights is not None:
        total = total * stack.weights
    total = total.sum(1) if total.shape[2] else total[:, 0]
    number: Tensor | float = seen
    if stack.weights is not None:
        number = stack.weights.sum((1, 2))
    elif exchange.ranks is not None:
        number = gram.new_full((len(gram),), seen)
    return Evidence(gram, shift, total, number, rest[0] if rest else None, _marks(stack, exchange))


def _marks(stack: Stack, exchange: Exchange) -> Tensor | None:
    """This rank's fingerprints for marks, ``[G, n]``, or what it meets of them, ``[G, n, 3]``."""
    known = stack.repeats
    if known is None:
        return None
    found = fingerprints(stack.responses[..., : stack.exact], stack.weights)
    if known.blank:
        return make_marks(found, exchange.rank, exchange.size)
    return matches(known.marks, found, stack.rows)

"""Units of a step laid side by side: one batched computation for all that have the same shape."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.reading import Part
from bayesagg.repeats import Repeats
from bayesagg.units import Unit

__all__ = ["Columns", "Stack", "cat", "columns_of", "make_stacks", "runs"]

_CHUNK = 1 << 22  # elements of an intermediate tensor; bounds the extra memory of dense heads


@dataclass
class Columns:
    """Working responses of a unit's outputs over the data of a step.

    Attributes:
        responses: ``[N, P]``; those of exact likelihoods come first.
        exact: how many those are, ``R``.
        weights: of the data in the evidence, relative to their mean over labels; ``[N, G]``, or
            ``None`` where all are one.
        factor: of the loss, ``[N, R]`` or ``[1, R]``.
        misfit: whose mean is the scale of every task, ``[N, T]``; of exact ones only where they
            have no scale yet.
    """

    responses: Tensor
    exact: int
    weights: Tensor | None
    factor: Tensor
    misfit: Tensor


@dataclass
class Stack:
    """``G`` Gram matrices of one shape, of ``P`` columns each, on ``S`` feature tensors.

    Attributes:
        units: in their order.
        parts: a part of every unit, which says what it reads.
        rows: features, ``[N, d]`` each; one that all read, or one a Gram matrix.
        bias: whether the constant of a bias is appended.
        responses: ``[G, N, P]``.
        exact: ``R``, as in :class:`Columns`.
        weights: ``[G, N, 1]``, or ``None``.
        factor: ``[G, N or 1, R]``.
        misfit: ``[G, N, T]``.
    """

    units: list[Unit]
    parts: list[Part]
    rows: list[Tensor]
    bias: bool
    responses: Tensor
    exact: int
    weights: Tensor | None
    factor: Tensor
    misfit: Tensor
    _kept: Tensor | None = None
    _vectors: Tensor | None = None
    _turned: tuple[slice, Tensor, Tensor] | None = None

    @property
    def sizes(self) -> list[int]:
        """Gram matrices of every unit."""
        return [unit.gram.shape[0] for unit in self.units]

    @cached_property
    def repeats(self) -> Repeats | None:
        """Of the units that count how many data there are; all of them do, or none."""
        known = [u.repeats for u in self.units if u.repeats is not None and u.repeats.counting]
        return Repeats.joined(known) if known else None

    def precision(self, most: torch.dtype) -> torch.dtype:
        """That of the features, if it is enough for arithmetic, and ``most`` is not less."""
        own = torch.promote_types(self.rows[0].dtype, torch.float32)
        return own if most == torch.float64 else most

    def chunks(self) -> Iterator[slice]:
        """Data in pieces that bound the intermediate tensors."""
        groups, data, columns = self.responses.shape
        width = self.rows[0].shape[1] + 1
        size = max(1, _CHUNK // (groups * (width + columns)))
        if data <= size:
            yield slice(0, data)
            return
        step = math.ceil(data / math.ceil(data / size))
        for start in range(0, data, step):
            yield slice(start, min(data, start + step))

    def of(self, values: Tensor, rows: slice) -> Tensor:
        """Values ``[G, N or 1, …]`` of some data."""
        return values if rows.stop - rows.start >= values.shape[1] else values[:, rows]

    def features(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """``h̃`` of some data, ``[G, n, D]``; kept where they are all."""
        if self._kept is None or rows != slice(0, self.responses.shape[1]):
            data, width = rows.stop - rows.start, self.rows[0].shape[1]
            shape = (len(self.rows), data, width + self.bias)
            self._kept = torch.ones(shape, dtype=dtype, device=self.responses.device)
            for one, part in zip(self._kept.unbind(), self.rows, strict=True):
                (one[:, :width] if self.bias else one).copy_(
                    part[rows] if data < part.shape[0] else part
                )
            self._kept = self._kept.expand(len(self.responses), -1, -1)
        return self._kept

    def kept_vectors(self, dtype: torch.dtype) -> Tensor | None:
        """The basis that the units have and keep in this step, ``[G, D, D]``."""
        if self._vectors is None:
            bases = [u.basis.vectors for u in self.units if u.basis is not None and u.basis.left]
            if len(bases) < len(self.units):
                return None
            self._vectors = cat(bases).to(self.precision(dtype))
        return self._vectors

    def rotated(self, rows: slice, dtype: torch.dtype, vectors: Tensor) -> Tensor:
        """``h̃ᵀQ`` of some data, ``[G, n, D]``; kept where they are all, in a basis that is kept."""
        if self._turned is not None and self._turned[0] == rows and self._turned[1] is vectors:
            return self._turned[2]
        h = self.features(rows, dtype).to(vectors.dtype)
        found = torch.bmm(h, vectors)
        self._turned = (rows, vectors, found)
        return found


class _Working:
    """What the heads of a part are to the evidence, each worked out once, for all of them."""

    def __init__(self, part: Part) -> None:
        assert part.labels is not None
        self.labels, self.bound, self._part = part.labels, BOUNDS[part.kind], part

    @cached_property
    def responses(self) -> Tensor:
        """Of every column, ``[N, P]``."""
        return self.bound.working(self.labels, self._part.gradient)

    @cached_property
    def misfit(self) -> Tensor:
        """Of every task, ``[N, K]``."""
        return self.bound.misfit(self.labels)

    @cached_property
    def factor(self) -> Tensor:
        """Of the loss, zero where a label is missing, ``[N, K]`` or ``[1, K]``."""
        present = self.labels.present
        return self.labels.factor if present is None else self.labels.factor * present

    @cached_property
    def weights(self) -> Tensor:
        """Of the data, ``[N, K]``."""
        own = self.labels.weights()
        if own is not None:
            return own
        return torch.ones_like(self.labels.factor.expand(len(self.labels.outputs), -1))


def columns_of(
    unit: Unit, here: Mapping[str, Part], working: Mapping[int, _Working], dtype: torch.dtype
) -> Columns:
    """The columns of one unit, from the parts that its heads are in.

    Args:
        unit: its heads are all in this step.
        here: the part of every head.
        working: of every part, by its identity.
        dtype: of the evidence.
    """
    responses, misfits, factors = [], [], []
    weights: Tensor | None = None
    exact = 0
    for part, names in runs(unit.names, here):
        own = working[id(part)]
        wide = own.responses.shape[1] // own.labels.factor.shape[1]  # columns a task
        whole = (*names,) == part.names
        tasks = None if whole else [i for name in names for i in _span(part.slices[name])]
        responses.append(_select(own.responses, tasks, wide))
        if not (own.bound.exact and unit.started):
            misfits.append(_select(own.misfit, tasks))
        if own.bound.exact:
            exact += responses[-1].shape[1]
            factors.append(_select(own.factor, tasks))
        if unit.weighted:
            weights = _select(own.weights, tasks)
    together = cat(responses, 1).to(dtype)
    return Columns(
        together,
        exact,
        None if weights is None else weights.to(dtype),
        _cat_rows(factors) if factors else together[:1, :0],
        cat(misfits, 1).to(dtype) if misfits else together[:, :0],
    )


def make_stacks(units: Sequence[Unit], here: Mapping[str, Part], dtype: torch.dtype) -> list[Stack]:
    """Stacks of all units that take part in a step."""
    working = {id(part): _Working(part) for part in here.values()}
    groups: dict[tuple[object, ...], list[tuple[Unit, Part, Columns]]] = {}
    for unit in units:
        part = here[unit.names[0]]
        columns = columns_of(unit, here, working, dtype)
        signature = (
            unit.gram.shape[1:],
            unit.shift.shape[1:],
            columns.exact,
            unit.weighted,
            unit.wide,
            unit.started,
            unit.basis is not None and unit.basis.left > 0,
            unit.repeats and (unit.repeats.counting, unit.repeats.blank),
            part.features.shape,
            columns.factor.shape[0],
        )
        groups.setdefault(signature, []).append((unit, part, columns))
    return [_stack(group) for group in groups.values()]


def _stack(group: Sequence[tuple[Unit, Part, Columns]]) -> Stack:
    units, parts, all_columns = [list(some) for some in zip(*group, strict=True)]
    if len({part.key for part in parts}) == 1:
        rows = [parts[0].features]
    else:
        rows = [p.features for p, u in zip(parts, units, strict=True) for _ in range(len(u.gram))]
    wide = units[0].wide
    first = all_columns[0]
    return Stack(
        units,
        parts,
        rows,
        units[0].gram.shape[-1] > parts[0].features.shape[1],
        _grams([columns.responses for columns in all_columns], wide),
        min(first.exact, 1) if wide else first.exact,
        None
        if first.weights is None
        else _grams([c.weights for c in all_columns if c.weights is not None], True),
        _grams([columns.factor for columns in all_columns], wide),
        _grams([columns.misfit for columns in all_columns], wide),
    )


def _grams(parts: Sequence[Tensor], wide: bool) -> Tensor:
    """Columns ``[N, P]`` of every unit by Gram matrix: ``[G, N, P]``, or ``[G, N, 1]`` if wide."""
    if wide:
        return cat(parts, 1).mT[..., None]
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def runs(names: Sequence[str], here: Mapping[str, Part]) -> list[tuple[Part, list[str]]]:
    """Neighbours of one part together."""
    runs: list[tuple[Part, list[str]]] = []
    for name in names:
        if runs and runs[-1][0] is here[name]:
            runs[-1][1].append(name)
        else:
            runs.append((here[name], [name]))
    return runs


def _span(columns: slice) -> range:
    return range(columns.start, columns.stop)


def _select(values: Tensor, tasks: list[int] | None, wide: int = 1) -> Tensor:
    """Columns of some tasks, ``wide`` each; all where ``tasks`` is ``None``."""
    if tasks is None:
        return values
    columns = [wide * i + j for i in tasks for j in range(wide)]
    first, last = columns[0], columns[-1] + 1
    if columns == list(range(first, last)):
        return values[:, first:last]
    return values[:, columns]


def _cat_rows(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    rows = max([part.shape[0] for part in parts])
    return cat([part if part.shape[0] == rows else part.expand(rows, -1) for part in parts], 1)


def cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """As ``torch.cat``; without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)

"""How many data there are, found out from labels that come again.

Evidence that fades over ``N`` data has every datum ``N / M`` times in it where there are only
``M``: posteriors would be too sure of themselves, and heads over-fitted. Nobody says how many there
are. But labels of regressions tell data apart, so some are kept as *marks*: if ``n`` of them were
met ``m`` times in ``s`` data, then ``M ≈ s n / m``.

Not all labels do: ages and ratings come again with other data. Then a mark is met several times in
one step, at data of different features.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesagg.checking import check, check_keys, scalar_leaf, tensor_leaf
from bayesagg.constants import kept

__all__ = ["Repeats", "fingerprints", "load_repeats", "make_marks", "matches"]

_MARKS = 128
_MOST = 1 << 16  # data of a step that are looked at; of more, many are new
_ROUNDING = 2e-6  # of labels that a loss in single precision tells
_WINDOW = 2.0  # memories of data, after which sizes are told anew
_AGAIN = 1.25  # how often marks must have been met before the first of these tells anything
_ALIKE = 0.01  # of all meetings those of several data in a step, which labels do not tell apart
_SAME = 1e-4  # relative variance of the features of a datum that is in a step several times
_ENDLESS = sys.float_info.max  # the size where labels do not tell
_LISTS = ("number", "met", "alike", "seen", "sizes")
_KEPT = _LISTS[1:]  # in a checkpoint: the marks say how many they are


@dataclass(frozen=True)
class Repeats:
    """What is known of the number of data of a unit, by Gram matrix (G).

    Attributes:
        marks: fingerprints of labels, and how far off others may be by rounding, ``[G, 2, n]``,
            less than zero where there is no mark; ``[G, 2, 0]`` once there are more data than the
            memory is long. Made anew in every window.
        number: of marks.
        met: how often they were met in this window.
        alike: how often by several data of a step, of different features.
        seen: data of this window.
        sizes: data that there are, as the last window has told; 0 before.
    """

    marks: Tensor
    number: Sequence[float]
    met: Sequence[float]
    alike: Sequence[float]
    seen: Sequence[float]
    sizes: Sequence[float]

    @property
    def counting(self) -> bool:
        """There are marks to be made, or met."""
        return self.marks.shape[2] > 0

    @property
    def blank(self) -> bool:
        """There were no data in this window yet."""
        return not any(self.seen)

    def after(self, found: Tensor, seen: Tensor | float, length: float) -> Repeats:
        """With the data of a step, of all ranks, so many (by Gram matrix); looks at the device.

        ``found``: what they meet of the marks, ``[G, n, 3]``, see :func:`matches`; of the first
        data of a window their fingerprints, ``[G, n]``, for marks.
        """
        data = seen.tolist() if isinstance(seen, Tensor) else [seen] * len(found)
        if not any(data):
            return self
        now = self._marked(found) if self.blank else self._met(found)
        now = replace(now, seen=[a + b for a, b in zip(self.seen, data, strict=True)])
        return now._told(length) if max(now.seen) >= _WINDOW * length else now

    def _marked(self, marks: Tensor) -> Repeats:
        """With marks; none in this window where labels repeat, or of one datum.

        If epochs are shuffled, a mark is met ``s/M`` times in ``s`` data from the start of an
        epoch, itself the first time, and half a time more from somewhere in it.
        """
        marks = marks.sort(1).values  # the same whatever rank they are of
        there = marks < _nothing(marks)
        size = marks.abs().where(there, 0.0)
        level = size.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        near = torch.stack([marks, (_ROUNDING * (size + level)).where(there, -1.0)], 1)
        several = there.sum(1) > 1  # with one a step, nothing shows that labels do not tell
        tied = (_near(near, marks).sum((1, 2)) > there.sum(1)) | ~several
        near[:, 1] = near[:, 1].masked_fill(tied[:, None], -1.0)
        number = _number(near)
        met = [n / 2 if any(self.sizes) else n for n in number]
        return replace(self, marks=near, number=number, met=met)

    def _met(self, found: Tensor) -> Repeats:
        data, total, squares = found.unbind(2)
        several = total.square() < (1 - _SAME) * data * squares
        pair = torch.stack([data, several.to(data.dtype)]).sum(2).tolist()
        met, alike = (
            [a + b for a, b in zip(old, new, strict=True)]
            for old, new in zip((self.met, self.alike), pair, strict=True)
        )
        return replace(self, met=met, alike=alike)

    def _told(self, length: float) -> Repeats:
        """At the end of a window; of the second in which data were new, nobody counts on."""
        found = [self._size(i) if n else self.sizes[i] for i, n in enumerate(self.number)]
        sizes = [size or length for size in found]
        many = min(sizes) >= length and min(self.sizes) >= length
        zeros = [0.0] * len(sizes)
        marks = self.marks[..., :0] if many else torch.full_like(self.marks, -1.0)
        return Repeats(marks, zeros, zeros, zeros, zeros, sizes)

    def _size(self, index: int) -> float:
        """Data of a Gram matrix, as this window tells; 0 where too few marks have come again."""
        number, met = self.number[index], self.met[index]
        if self.sizes[index] == _ENDLESS or self.alike[index] > _ALIKE * met:
            return _ENDLESS
        return self.seen[index] * number / met if met >= _AGAIN * max(number, 1.0) else 0.0

    def lengths(self, length: float) -> list[float]:
        """The memory of every Gram matrix: no datum is in it more than once."""
        first = not any(self.sizes)
        sizes = [self._size(i) if first else size for i, size in enumerate(self.sizes)]
        return [min(length, size or length) for size in sizes]

    def split(self, sizes: Sequence[int]) -> list[Repeats]:
        """By unit, of so many Gram matrices each."""
        if len(sizes) == 1:
            return [self]
        found, start = [], 0
        for size, marks in zip(sizes, self.marks.split(list(sizes)), strict=True):
            own = slice(start, start + size)
            found.append(Repeats(marks, *(getattr(self, key)[own] for key in _LISTS)))
            start += size
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers, lists and dicts."""
        return {"marks": self.marks.clone(), **{key: list(getattr(self, key)) for key in _KEPT}}

    @staticmethod
    def joined(parts: Sequence[Repeats]) -> Repeats:
        """Side by side."""
        if len(parts) == 1:
            return parts[0]
        lists = ([x for part in parts for x in getattr(part, key)] for key in _LISTS)
        return Repeats(torch.cat([part.marks for part in parts]), *lists)

    @staticmethod
    def empty(groups: int, like: Tensor) -> Repeats:
        """Before any data."""
        zeros = [0.0] * groups
        return Repeats(like.new_full((groups, 2, _MARKS), -1.0), zeros, zeros, zeros, zeros, zeros)


def fingerprints(labels: Tensor, weights: Tensor | None) -> Tensor:
    """One number a datum, ``[G, N]``, from the labels of its regressions, ``[G, N, R]``.

    Data without any weight, ``[G, N, 1]``, have none.
    """
    prints = labels @ _mix(labels.shape[2], labels.dtype, labels.device)
    if weights is None:
        return prints
    return prints.masked_fill(weights[..., 0] == 0, _nothing(prints))


@kept
def _mix(tasks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Factors of labels, all different: those that add up to one also tell data apart."""
    return torch.linspace(1, 2, tasks, dtype=dtype, device=device)


def make_marks(prints: Tensor, rank: int, ranks: int) -> Tensor:
    """Fingerprints for marks, ``[G, n]``, of those of this rank's data, ``[G, N]``.

    Those of all ranks are the sum of what each gives: every rank has places of its own.
    """
    own = max(1, _MARKS // ranks)
    places = slice(rank * own, (rank + 1) * own)
    marks = prints.new_zeros(len(prints), _MARKS)
    if rank == 0:  # and those of nobody
        marks[:, ranks * own :] = _nothing(prints)
    mine = marks[:, places]
    mine.fill_(_nothing(prints))
    width = min(mine.shape[1], prints.shape[1])
    mine[:, :width] = prints[:, :width]
    return marks


def matches(marks: Tensor, prints: Tensor, features: Sequence[Tensor]) -> Tensor:
    """What data, by their fingerprints, ``[G, N]``, meet of the marks; adds up over ranks.

    ``features``: ``[N, d]`` each, of all Gram matrices or of each. By mark the number of data that
    it is met at, and the sums of a number that their features give and of its square,
    ``[G, n, 3]``.
    """
    near = _near(marks, prints[:, :_MOST]).to(prints.dtype)
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    probe, powers = _probe(features[0].shape[1], dtype, prints.device)
    one = [h[:_MOST].to(dtype) @ probe for h in features]
    sums = (one[0][None] if len(one) == 1 else torch.stack(one))[..., None].pow(powers)
    return torch.bmm(near, sums.to(near.dtype).expand(len(near), -1, -1))


@kept
def _probe(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What makes one number of a datum's features, which their mean hardly moves; and 0, 1, 2."""
    return (
        torch.linspace(-1, 1, width, dtype=dtype, device=device),
        torch.arange(3, dtype=dtype, device=device),
    )


def load_repeats(state: Any, blank: Repeats, what: str) -> Repeats:
    """Those of a checkpoint; ``blank`` has their shape."""
    check_keys(state, ("marks", *_KEPT), f"{what}: the count of repeats")
    marks, groups = state["marks"], len(blank.marks)
    width = 0 if isinstance(marks, Tensor) and not marks.numel() else _MARKS
    marks = tensor_leaf(marks, (groups, 2, width), blank.marks, f"{what}: the marks")
    for key in _KEPT:
        values = state[key]
        check(
            isinstance(values, list) and len(values) == groups,
            f"{what}: {key} of the repeats is not a list of {groups}",
        )
        for value in values:
            scalar_leaf(value, float, f"{what}: {key} of the repeats", 0.0)
    return Repeats(marks, _number(marks), *(list(state[key]) for key in _KEPT))


def _near(marks: Tensor, prints: Tensor) -> Tensor:
    """Which data, ``[G, n, N]``, have the fingerprint of a mark."""
    return (prints[:, None] - marks[:, 0, :, None]).abs_() <= marks[:, 1, :, None]


def _number(marks: Tensor) -> list[float]:
    return [float(n) for n in (marks[:, 1] >= 0).sum(1).tolist()]


def _nothing(like: Tensor) -> float:
    return torch.finfo(like.dtype).max

"""Data that come in the order of their labels, which heads that follow the latest would fit.

Evidence fades over data that are taken for a sample of all. Where data are sorted by a label, the
latest are not: the heads move along with the sorting, their residuals are small, and predictions
for all other data are wrong. So the first steps are looked at: whether the mean labels of batches
that follow each other are alike, and those of batches far apart are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.constants import kept
from bayesagg.reading import Labels, Part

__all__ = ["Order"]

_STEPS = 40  # with labels of a task: less than the warm-up
_ROWS = 64  # of a step, the first
_LOOKS = 10  # at labels that say nothing yet, twenty steps apart
_BETWEEN = 0.5  # variance of the mean labels of batches over that of the labels
_SUCCESSIVE = 0.3  # von Neumann's ratio: 2 in any random order
_BEGUN = 1.5  # the same of batches of which the last are the first of another kind


Some = tuple[Tensor, Tensor | None]  # labels of a part, and which of them there are


class Order:
    """Whether the data of some tasks are in the order of their labels; warns once of each.

    Args:
        names: of the tasks.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._seen: dict[str, list[tuple[slice, Some]]] = {name: [] for name in names}
        self._looks = dict.fromkeys(self._seen, _LOOKS)

    @torch.no_grad()
    def see(self, parts: Sequence[Part]) -> None:
        """Labels of a step; looks at the device in the last that is looked at."""
        due = []
        for part in parts if self._seen else ():
            names = [name for name in part.names if name in self._seen]
            if not names or part.labels is None:
                continue
            few = _few(part.labels)
            for name in names:
                self._seen[name].append((part.slices[name], few))
                if len(self._seen[name]) == _STEPS:
                    due.append(name)
        if due:
            found = torch.stack([_verdict(self._seen[name]) for name in due])
            for name, (ordered, undecided) in zip(due, found.tolist(), strict=True):
                self._decide(name, ordered, undecided)

    def _decide(self, name: str, ordered: bool, undecided: bool) -> None:
        self._looks[name] -= 1
        if undecided and not ordered and self._looks[name]:
            del self._seen[name][: _STEPS // 2]
            return
        del self._seen[name]
        if ordered:
            warnings.warn(
                f"task {name!r}: the data seem to come sorted by its labels: those of batches that "
                f"follow each other are alike, and those of others are not. Training follows the "
                f"latest data and may predict all others badly. Shuffle the data.",
                stacklevel=7,
            )


def _few(labels: Labels) -> Some:
    """Some labels of a step, ``[n, K]``, of classes the index; which of them are present."""
    some, present = labels.targets[:_ROWS], labels.present
    if some.dim() == 3:
        some = some @ _indices(some.shape[2], some.dtype, some.device)
    else:
        some = some.clone()  # not a part of what would be kept with it
    return some, None if present is None else present[:_ROWS].clone()


@kept
def _indices(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=dtype, device=device)


def _verdict(steps: Sequence[tuple[slice, Some]]) -> Tensor:
    """Whether any output of a task is in order, or may still be, ``[2]``.

    By von Neumann's ratio of the mean labels ``m_t`` of the steps, ``E (m_{t+1} - m_t)² / Var m``,
    which is 2 in a random order; where these differ more than the labels of a step do.

    Args:
        steps: columns of the task's outputs, and labels of a part, ``[n, K]``, of every step.
    """
    rows, latest = max(len(labels) for _, (labels, _) in steps), steps[-1][1][0]
    every = []
    for columns, (labels, present) in steps:
        t = labels[:, columns].to(latest)  # the network may have been moved
        known = torch.ones_like(t) if present is None else present[:, columns].to(t)
        every.append(F.pad(torch.stack([t, known]), (0, 0, 0, rows - len(t))))
    t, known = torch.stack(every, 1)
    count = known.sum(1)
    origin = t.masked_fill(known == 0, -torch.inf).amax((0, 1))
    t = (t - origin) * known  # no rounding of what is far from zero, or all the same
    mean, square = t.sum(1) / count, t.square().sum(1) / count  # NaN without a label: not judged
    within = (square - mean.square()).mean(0)
    between = mean.var(0, correction=0)
    successive = mean.diff(dim=0).square().mean(0)
    apart = between > _BETWEEN * (between + within)
    ordered = apart & (successive < _SUCCESSIVE * between)
    # One class up to here may be the order, and so may another that has just begun.
    begun = apart & (successive < _BEGUN * between)
    constant = between + within <= 0
    return torch.stack([ordered.any(), constant.all() | begun.any()])

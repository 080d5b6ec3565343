"""What is remembered of losses that were verified: plain numbers, part of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bayesagg.checking import check, check_keys
from bayesagg.heads import Head, LossTask

__all__ = ["Known", "load", "state"]

_FORMS = 16  # of one loss; more are verified in every step
# The factor of a column is a number over one of these: the data, the labels of the head (per column
# on average), those of the column, or one.
_REDUCTIONS = ("rows", "labels", "columns", "sum")


@dataclass(frozen=True)
class Known:
    """The form of one task's loss.

    Attributes:
        own: it is not the head's likelihood; this stays so.
        weighted: the factor differs between data.
        masked: labels have been missing.
        factor: of every column, ``[K]``, when it was verified; empty if there was none to see.
        rows: data in that step.
        labels: of every column that were present in that step, ``[K]``.
        forms: of the loss, that were verified.
        reductions: over which counts the factor may be: several, if the steps so far do not tell.
    """

    own: bool = False
    weighted: bool = False
    masked: bool = False
    factor: tuple[float, ...] = ()
    rows: int = 0
    labels: tuple[int, ...] = ()
    forms: tuple[int, ...] = ()
    reductions: tuple[str, ...] = _REDUCTIONS

    def factors(self, rows: int) -> list[float]:
        """Of every column for another number of data, all labelled; empty: it is not clear."""
        if self.own or self.weighted or not self.factor:
            return []
        every = [
            [f * n / (1 if one == "sum" else rows) for f, n in self._over(one)]
            for one in self.by_label or self.reductions
        ]
        same = all(max(some) <= min(some) * (1 + 1e-9) for some in zip(*every, strict=True))
        return every[0] if same else []

    @property
    def by_label(self) -> tuple[str, ...]:
        """Over which labels the factor may be a number, if some may be missing."""
        if not self.masked:
            return ()
        choices = ("labels", "columns") if len(self.labels) > 1 else ("labels",)
        return tuple(one for one in choices if one in self.reductions)

    def _over(self, reduction: str) -> list[tuple[float, float]]:
        """The factor of every column, and what it was a number over."""
        counts: Sequence[float] = self.labels
        if reduction != "columns":
            mean = sum(self.labels) / len(self.labels)
            counts = [{"rows": self.rows, "labels": mean, "sum": 1.0}[reduction]] * len(self.labels)
        return list(zip(self.factor, counts, strict=True))

    def after(self, before: Known | None, tolerance: float) -> Known:
        """With what earlier steps have told."""
        if before is None:
            return self
        masked = self.masked or before.masked
        forms = tuple(dict.fromkeys((*before.forms, *self.forms)))[-_FORMS:]
        if not before.factor or not self.factor or self.weighted or before.weighted:
            return replace(self, masked=masked, forms=forms)
        left = [
            reduction
            for reduction in before.reductions
            if all(
                abs(new * n - old * m) <= tolerance * abs(old) * m
                for (new, n), (old, m) in zip(
                    self._over(reduction), before._over(reduction), strict=True
                )
            )
        ]
        reductions = tuple(left) or _REDUCTIONS
        return replace(self, masked=masked, forms=forms, reductions=reductions)


def state(known: Mapping[str, Known]) -> dict[str, dict[str, Any]]:
    """Plain dictionaries."""
    return {
        name: {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(one).items()
        }
        for name, one in known.items()
    }


def load(saved: Any, tasks: Mapping[str, Head | LossTask]) -> dict[str, Known]:
    """Inverse of :func:`state`.

    Raises:
        CheckpointError: if a leaf is of another kind or of other heads.
    """
    check(isinstance(saved, dict), "what was verified of the losses is missing")
    found = {}
    for name, one in saved.items():
        head = tasks.get(name) if isinstance(name, str) else None
        check(isinstance(head, Head), f"there is no head for the task {name!r}")
        assert isinstance(head, Head)
        found[name] = _loaded(one, head.num_tasks, f"what was verified of task {name!r}")
    return found


def _loaded(one: Any, tasks: int, what: str) -> Known:
    check_keys(one, list(Known.__dataclass_fields__), what)

    def fine(key: str, holds: bool) -> None:
        check(holds, f"{what} ({key}) is {one[key]!r}")

    for key in ("own", "weighted", "masked"):
        fine(key, type(one[key]) is bool)
    fine("rows", type(one["rows"]) is int and one["rows"] >= 0)
    for key in ("labels", "factor", "forms", "reductions"):
        fine(key, isinstance(one[key], list))
    fine("labels", len(one["labels"]) in (0, tasks))
    fine("labels", all(type(n) is int and 0 <= n <= one["rows"] for n in one["labels"]))
    factor, reductions = one["factor"], one["reductions"]
    fine("forms", all(type(form) is int for form in one["forms"]))
    fine("reductions", bool(reductions) and all(r in _REDUCTIONS for r in reductions))
    fine("factor", len(factor) in (0, tasks))
    fine("factor", all(type(f) is float and 0 < f < float("inf") for f in factor))
    check(not factor or (one["labels"] and min(one["labels"]) > 0), f"{what} has no data")
    leaves: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
    return Known(**leaves)

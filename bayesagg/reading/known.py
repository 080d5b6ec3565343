"""What is remembered of losses that were verified: plain numbers, part of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from bayesagg.checking import check, check_keys
from bayesagg.heads import Head, LossTask

__all__ = ["Known", "load", "state"]

_FORMS = 16  # of one loss; more are verified in every step
_REDUCTIONS = ("rows", "labels", "sum")  # the factor is a number over one of these counts


@dataclass(frozen=True)
class Known:
    """The form of one task's loss.

    Attributes:
        own: it is not the head's likelihood; this stays so.
        weighted: the factor differs between data.
        masked: labels have been missing.
        factor: of every column, ``[K]``, when it was verified; empty if there was none to see.
        rows: data in that step.
        labels: labels that were present in that step, per column on average.
        forms: of the loss, that were verified.
        reductions: over which counts the factor may be: several, if the steps so far do not tell.
    """

    own: bool = False
    weighted: bool = False
    masked: bool = False
    factor: tuple[float, ...] = ()
    rows: int = 0
    labels: float = 0.0
    forms: tuple[int, ...] = ()
    reductions: tuple[str, ...] = _REDUCTIONS

    def ratio(self, rows: int) -> float | None:
        """What the factor is multiplied by for another number of data, all labelled.

        ``None``: it is not clear.
        """
        if self.own or self.weighted or not self.factor:
            return None
        reductions = ("labels",) if self.by_label else self.reductions
        ratios = [self.count(one) / _count(one, rows, rows) for one in reductions]
        return ratios[0] if max(ratios) <= min(ratios) * (1 + 1e-9) else None

    @property
    def by_label(self) -> bool:
        """Labels may be missing, and the factor can be a number over those that are not."""
        return self.masked and "labels" in self.reductions

    def count(self, reduction: str) -> float:
        """What the factor was a number over."""
        return _count(reduction, self.rows, self.labels)

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
                abs(new * self.count(reduction) - old * before.count(reduction))
                <= tolerance * abs(old) * before.count(reduction)
                for new, old in zip(self.factor, before.factor, strict=True)
            )
        ]
        reductions = tuple(left) or _REDUCTIONS
        return replace(self, masked=masked, forms=forms, reductions=reductions)


def _count(reduction: str, rows: float, labels: float) -> float:
    return {"rows": rows, "labels": labels, "sum": 1.0}[reduction]


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
    for key, kind in (("rows", int), ("labels", float)):
        fine(key, type(one[key]) is kind and 0 <= one[key] < float("inf"))
    for key in ("factor", "forms", "reductions"):
        fine(key, isinstance(one[key], list))
    factor, reductions = one["factor"], one["reductions"]
    fine("forms", all(type(form) is int for form in one["forms"]))
    fine("reductions", bool(reductions) and all(r in _REDUCTIONS for r in reductions))
    fine("factor", len(factor) in (0, tasks))
    fine("factor", all(type(f) is float and 0 < f < float("inf") for f in factor))
    check(not factor or (one["rows"] > 0 and one["labels"] > 0), f"{what} has no data")
    leaves: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}
    return Known(**leaves)

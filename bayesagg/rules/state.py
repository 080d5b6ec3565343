"""What the paper's rule remembers of one group of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesagg.checking import check, check_keys, tensor_leaf
from bayesagg.likelihoods import Evidence
from bayesagg.rules.groups import Group

__all__ = ["State"]

_LAG = 0.9  # weight of the past in the running means of learned scales
_LEAST = 1e-10  # of the labels' mean square: what a mean of squared residuals is known to
_EVIDENCE = ("full", "running", "faded")
_PARTS = ("precision", "shift", "count")


@dataclass(frozen=True)
class State:
    """Evidence of a group of ``K`` tasks, and the learned scales.

    Attributes:
        full: evidence of the last epoch, the prior of a step.
        running: of this epoch, or since the start where none has ended.
        faded: the prior of a step where no epoch has ended.
        scale: sums of the running means of learned scales and of their weights, ``[2, K]``.
    """

    full: Evidence | None = None
    running: Evidence | None = None
    faded: Evidence | None = None
    scale: Tensor | None = None

    def learned(self, squares: Tensor | None, count: Tensor) -> Tensor:
        """Learned τ² of every task, ``[K]``; at first that of the batch itself, 1 without labels.

        ``squares``: of a batch, ``[2, K]``, and how many labels it has, ``[K]``.
        """
        otherwise = torch.ones_like(count)
        if squares is not None:
            otherwise = torch.where(count > 0, _mean_square(squares, count), otherwise)
        if self.scale is None:
            return otherwise
        total, weight = self.scale
        return torch.where(weight > 0, total / weight, otherwise)

    def moved(self, squares: Tensor | None, count: Tensor) -> Tensor | None:
        """The running means with those of a batch, over the steps in which a task has labels."""
        if squares is None:
            return self.scale
        value = _mean_square(squares, count)
        new = torch.stack([value, torch.ones_like(value)])
        old = torch.zeros_like(new) if self.scale is None else self.scale
        return torch.where(count > 0, _LAG * old + (1 - _LAG) * new, old)

    def end_epoch(self) -> State:
        """The epoch's evidence as prior of the next; a task without a label in it keeps its own."""
        new, old = self.running, self.full
        if new is not None and old is not None and not bool((new.count > 0).all()):
            seen = new.count > 0
            wide = max(len(new.precision), len(old.precision)) > 1
            keep = seen[:, None, None] if wide else seen.any()
            new = Evidence(
                torch.where(keep, new.precision, old.precision),
                torch.where(seen[:, None], new.shift, old.shift),
                torch.where(seen, new.count, old.count),
            )
        return State(old if new is None else new, None, None, self.scale)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint: tensors and dicts, copied."""
        found: dict[str, Any] = {"scale": None if self.scale is None else self.scale.clone()}
        for key in _EVIDENCE:
            part = getattr(self, key)
            found[key] = part and {name: getattr(part, name).clone() for name in _PARTS}
        return found

    @staticmethod
    def read(plain: dict[str, Any], group: Group, like: Tensor) -> State:
        """Inverse of :meth:`plain`, in the dtype and on the device of ``like``."""
        what = "tasks " + ", ".join(map(repr, group.heads))
        scale = plain["scale"]
        if scale is not None:
            check(group.learns, f"{what}: there is a learned noise variance, which these fix")
            scale = tensor_leaf(scale, (2, group.num_tasks), like, f"{what}: noise estimate", 0.0)
        full, running, faded = (
            _evidence(plain[key], group, like, f"{what}: {key}") for key in _EVIDENCE
        )
        return State(full, running, faded, scale)


def _evidence(plain: Any, group: Group, like: Tensor, what: str) -> Evidence | None:
    if plain is None:
        return None
    check_keys(plain, _PARTS, what)
    tasks, m = group.num_tasks, group.likelihood.parameters
    value = plain["precision"]
    shared = group.likelihood.shares and isinstance(value, Tensor) and value.shape[:1] == (1,)
    groups = 1 if shared else tasks
    precision = tensor_leaf(value, (groups, m, m), like, f"{what} precision")
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    check(bool((diagonal >= 0).all()), f"{what} precision has a negative diagonal")
    shift = (tasks * group.likelihood.rows, m)
    return Evidence(
        precision,
        tensor_leaf(plain["shift"], shift, like, f"{what} shift"),
        tensor_leaf(plain["count"], (tasks,), like, f"{what} count", 0.0),
    )


def _mean_square(squares: Tensor, count: Tensor) -> Tensor:
    """Mean squared residual, ``[K]``, kept above rounding of the labels themselves."""
    residual, level = squares / count.clamp(min=1)
    return torch.maximum(residual, _LEAST * level + torch.finfo(count.dtype).tiny)

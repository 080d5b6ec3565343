"""Features and labels of every head over a loader, which the network sees as rarely as possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.errors import TargetError, UnknownTaskError
from bayesagg.heads import Head
from bayesagg.predicting.network import Heads, call, check_finite, moved
from bayesagg.reading.hooks import flatten

__all__ = ["CHUNK", "Rows", "Source"]

CHUNK = 1 << 19  # elements of features at once: they stay in the cache of the processor


@dataclass(frozen=True)
class Rows:
    """Data of one head.

    Attributes:
        features: ``[N, d]``, in the precision of the network.
        targets: ``[N, o]``; of classes probabilities ``[N, C]``; finite where missing.
        present: booleans of the shape of the targets, of classes ``[N]``; ``None``: all.
    """

    features: Tensor
    targets: Tensor
    present: Tensor | None

    @property
    def labelled(self) -> Tensor:
        """Whether any datum has a label, by output."""
        if self.present is None:
            return torch.tensor(len(self.targets) > 0)
        return self.present.any(0).cpu()


class Source:
    """Passes over a loader in evaluation mode.

    What a first pass finds is kept, up to ``cache`` bytes, so that later ones do without the
    network; beyond that the loader is iterated again.

    Args:
        model: the network.
        heads: in it.
        loader: of pairs of inputs and targets by task.
        keep: tasks whose features later passes will ask for.
        cache: bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Heads,
        loader: Iterable[Any],
        keep: Iterable[str] = (),
        cache: int = 1 << 29,
    ) -> None:
        self.model, self.heads, self.loader = model, heads, loader
        self.keep, self._left = set(keep), cache
        self._kept: list[dict[str, Rows]] | None = []
        self._complete = False

    @torch.no_grad()
    def pieces(self) -> Iterator[dict[str, Rows]]:
        """The data in pieces, each of the heads that read one tensor: several batches, or a part.

        Raises:
            TargetError: if the loader has no data or none that can be read, a batch is no pair, or
                a task has no label at all.
            UnknownTaskError: if it has targets of a task without a head.
            CaptureError: if a head with labels was not run, or several times.
            FeatureError: if features are not finite.
        """
        if self._complete and self._kept is not None:
            yield from self._kept
            return
        # Whether every output has a label, [o]; of classes any, [].
        labelled = dict.fromkeys(self.heads.by_task, torch.tensor(False))
        for (tasks, *_), batches in self._together():
            for piece in self._read(tasks, batches):
                for task, rows in piece.items():
                    labelled[task] = labelled[task] | rows.labelled
                self._keep(piece)
                yield piece
        for task, seen in labelled.items():
            outputs = seen.view(-1).tolist()
            if not all(outputs):
                which = f"output {outputs.index(False)}" if any(outputs) else "it"
                raise TargetError(
                    f"task {task!r}: the loader has no label of {which}. Every head needs some: "
                    f"pass targets of all tasks, and a loader that can be iterated again (no "
                    f"generator)."
                )
        self._complete = True

    def of(self, task: str) -> Iterator[Rows]:
        """The data of one task; raises as :meth:`pieces`."""
        return (piece[task] for piece in self.pieces() if task in piece)

    def _keep(self, piece: dict[str, Rows]) -> None:
        if self._complete or self._kept is None:
            return
        self._kept.append({task: rows for task, rows in piece.items() if task in self.keep})
        tensors = {id(t): t for r in self._kept[-1].values() for t in (r.features, r.targets)}
        self._left -= sum(t.nbytes for t in tensors.values())
        if self._left < 0:
            self._kept = None

    def _together(self) -> Iterator[tuple[tuple[Any, ...], list[list[Tensor]]]]:
        """Of tasks that read one tensor: them, and it and their targets of batches that are alike.

        Batches are held back until their features are many.
        """
        held: dict[tuple[Any, ...], list[list[Tensor]]] = {}
        size, heads = 0, self.heads.by_task
        device = next(self.model.parameters()).device
        with self.heads.watched(self.model) as seen:
            for batch in self.loader:
                inputs, targets = _pair(batch, heads)
                call(self.model, moved(inputs, device))
                groups: dict[object, list[str]] = {}
                read = {task: self.heads.received(seen, task) for task in targets}
                for task, features in read.items():
                    groups.setdefault((id(features), heads[task].channels_first), []).append(task)
                for tasks in groups.values():
                    parts = [read[tasks[0]], *(targets[task] for task in tasks)]
                    forms: list[object] = [(part.shape[1:], part.dtype) for part in parts]
                    if parts[0].dim() < 2 or len({part.shape[:1] for part in parts}) > 1:
                        forms.append(object())  # like no other
                    held.setdefault((tuple(tasks), *forms), []).append(parts)
                    size += parts[0].numel()
                for calls in seen.values():
                    calls.clear()
                if size > CHUNK:
                    yield from held.items()
                    held, size = {}, 0
        yield from held.items()

    def _read(self, tasks: list[str], batches: list[list[Tensor]]) -> Iterator[dict[str, Rows]]:
        parts = zip(*batches, strict=True)
        features, *targets = (torch.cat(part) if len(part) > 1 else part[0] for part in parts)
        check_finite(tasks[0], features)
        first = self.heads.by_task[tasks[0]].channels_first
        places = (features.shape[0], *features.shape[2:]) if first else features.shape[:-1]
        features = flatten(features, first)
        size = max(1, CHUNK // features.shape[1])
        pieces: list[dict[str, Rows]] = [{} for _ in features.split(size)]
        for task, target in zip(tasks, targets, strict=True):
            head = self.heads.by_task[task]
            y, present = _labelled(task, head, features, target.to(features.device), places)
            seen = [None] * len(pieces) if present is None else present.split(size)
            rows = map(Rows, features.split(size), y.split(size), seen)
            for piece, own in zip(pieces, rows, strict=True):
                piece[task] = own
        yield from pieces


def _pair(batch: Any, heads: Mapping[str, Head]) -> tuple[Any, dict[str, Tensor]]:
    """Inputs, and targets by task."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TargetError(
            f"a batch of the loader must be a pair of inputs and targets by task, as in "
            f"(x, {{{next(iter(heads))!r}: y}}), got {type(batch).__name__}. Several inputs are a "
            f"tuple in first place: ((x1, x2), targets)."
        )
    inputs, targets = batch
    if isinstance(targets, tuple | list) and len(targets) == len(heads):
        targets = dict(zip(heads, targets, strict=True))
    if not isinstance(targets, Mapping):
        raise TargetError(
            f"targets of a batch must be a mapping from task to tensor, got "
            f"{type(targets).__name__}: pass {{{', '.join(f'{task!r}: …' for task in heads)}}}."
        )
    for task in targets:
        if task not in heads:
            raise UnknownTaskError(
                f"the loader has targets of {task!r}, which has no head here: the tasks are "
                f"{', '.join(map(repr, heads))}. Leave them out, or rename them."
            )
    return inputs, {task: torch.as_tensor(target) for task, target in targets.items()}


def _laid(target: Tensor, places: tuple[int, ...], outputs: int, first: bool) -> Tensor | None:
    """Targets as ``[N, outputs]``; ``None`` where their shape does not say which is whose.

    ``places``: shape of the data, batch and positions; ``first``: outputs are dimension 1.
    """
    data, shape = math.prod(places), tuple(target.shape)
    if (first or outputs == 1) and len(places) > 1 and shape == (places[0], outputs, *places[1:]):
        return target.movedim(1, -1).reshape(data, outputs)
    known: list[tuple[int, ...]] = [(*places, outputs), (data, outputs)]
    if outputs == 1:
        known += [places, (data,)]
    return target.reshape(data, outputs) if shape in known else None


def _labelled(
    task: str, head: Head, features: Tensor, target: Tensor, places: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Labels of a head as of :class:`Rows`, checked."""
    shape, first = (len(features), head.out_features), head.channels_first
    laid = _laid(target, places, shape[1], first)
    if head.kind == "multiclass":
        index = _laid(target, places, 1, first)
        y, present = _classes(task, shape, target, index, laid)
    elif laid is not None:
        y = laid.to(torch.promote_types(features.dtype, torch.float32))
        present = ~y.isnan()
        bad = y.isinf() if head.kind == "regression" else (y < 0) | (y > 1)
        if bool(bad.any()):
            what = "finite" if head.kind == "regression" else "between 0 and 1"
            raise TargetError(f"task {task!r}: targets must be {what}, or NaN where missing.")
    else:
        raise TargetError(
            f"task {task!r}: {list(target.shape)} targets for {shape[0]} data of {shape[1]} "
            f"outputs. Pass one for each output, in the shape of the head's output, NaN where "
            f"there is none."
        )
    return (y, None) if bool(present.all()) else (y.nan_to_num(0.0), present)


def _classes(
    task: str, shape: tuple[int, int], target: Tensor, index: Tensor | None, laid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Probabilities, ``[N, C]``, and which data have a label.

    The target is one number a datum, ``index``, or one a class, ``laid``, if it can be that.
    """
    data, classes = shape
    if laid is not None and laid.is_floating_point():
        y = laid
        present = ~y.isnan().any(1)
        rounding = max(1e-3, 8 * torch.finfo(y.dtype).eps)
        valid = (y >= 0).all(1) & ((y.float().sum(1) - 1).abs() < rounding)
    elif index is not None:
        index = index.nan_to_num(-100)
        present = index[:, 0] != -100
        label = index.long().clamp(0, classes - 1)
        valid = (label == index)[:, 0]
        y = torch.zeros(shape, device=target.device).scatter_(1, label, 1.0)
    else:
        raise TargetError(
            f"task {task!r}: {list(target.shape)} targets for {data} data of {classes} classes. "
            f"Pass class indices, -100 where there is none, or probabilities of all classes in the "
            f"shape of the head's output."
        )
    if not bool((valid | ~present).all()):
        raise TargetError(
            f"task {task!r}: class indices must lie in 0 to {classes - 1}, probabilities be "
            f">= 0 and sum to one; -100 or NaN where there is none."
        )
    return y, present

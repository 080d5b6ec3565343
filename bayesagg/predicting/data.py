"""Features and labels of every head over a loader, which the network sees as rarely as possible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.errors import TargetError, UnknownTaskError
from bayesagg.predicting.network import Heads, call, check_finite, evaluating, moved
from bayesagg.predicting.state import Layout

__all__ = ["Rows", "Source"]


@dataclass(frozen=True)
class Rows:
    """Data of one head in a batch.

    Attributes:
        features: ``[N, d]``, in the precision of the network.
        targets: ``[N, o]``; of classes probabilities ``[N, C]``; finite where missing.
        present: booleans of the shape of the targets, of classes ``[N]``; ``None``: all.
    """

    features: Tensor
    targets: Tensor
    present: Tensor | None


class Source:
    """Passes over a loader in evaluation mode.

    What a first pass finds is kept, up to ``cache`` bytes, so that later ones do without the
    network; beyond that the loader is iterated again.

    Args:
        model: the network.
        paths: of the last linear layers in it, by task.
        layouts: of the heads, by task.
        loader: of pairs of inputs and targets by task.
        keep: tasks whose features later passes will ask for.
        cache: bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str],
        layouts: Mapping[str, Layout],
        loader: Iterable[Any],
        keep: Iterable[str] = (),
        cache: int = 1 << 29,
    ) -> None:
        self.model, self.paths, self.layouts = model, paths, layouts
        self.loader, self.keep, self._left = loader, set(keep), cache
        self._kept: list[dict[str, Rows]] | None = []
        self._complete = False

    @torch.no_grad()
    def batches(self) -> Iterator[dict[str, Rows]]:
        """Of every batch the heads that have labels in it; heads that read one tensor share it.

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
        seen: dict[str, list[bool]] = {task: [False] for task in self.layouts}
        device = next(self.model.parameters()).device
        with evaluating(self.model):
            for batch in self.loader:
                found = self._read(batch, device)
                for task, rows in found.items():
                    # Looked for until every output has one, and no longer.
                    if not all(seen[task]):
                        seen[task] = _labels_of(rows, seen[task])
                self._keep(found)
                yield found
        for task, outputs in seen.items():
            if not all(outputs):
                which = f"output {outputs.index(False)}" if any(outputs) else "it"
                raise TargetError(
                    f"task {task!r}: the loader has no label of {which}. Every head needs some: "
                    f"pass targets of all tasks, and a loader that can be iterated again (no "
                    f"generator)."
                )
        self._complete = True

    def _keep(self, found: Mapping[str, Rows]) -> None:
        if self._complete or self._kept is None:
            return
        kept = {task: rows for task, rows in found.items() if task in self.keep}
        tensors = {id(t): t for r in kept.values() for t in (r.features, r.targets)}
        self._left -= sum(t.numel() * t.element_size() for t in tensors.values())
        if self._left < 0:
            self._kept = None
        else:
            self._kept.append(kept)

    def _read(self, batch: Any, device: torch.device) -> dict[str, Rows]:
        inputs, targets = _pair(batch, self.layouts)
        watch = Heads(self.model, self.paths, self.layouts)
        with watch.watched():
            call(self.model, moved(inputs, device))
        flat: dict[tuple[int, bool], Tensor] = {}
        found = {}
        for task, target in targets.items():
            layout, features = self.layouts[task], watch.features(task)
            key = (id(features), layout.channels_first)
            if key not in flat:
                check_finite(task, features)
                flat[key] = layout.flat(features)
            found[task] = _labelled(task, layout, flat[key], target.to(device))
        return found


def _labels_of(rows: Rows, before: list[bool]) -> list[bool]:
    """Whether every output has a label, in a batch or before."""
    if rows.present is None:
        return [True]
    present = rows.present if rows.present.dim() > 1 else rows.present[:, None]
    now = present.any(0).tolist()
    return [a or b for a, b in zip(now, before * (len(now) // len(before)), strict=True)]


def _pair(batch: Any, heads: Mapping[str, Layout]) -> tuple[Any, dict[str, Tensor]]:
    """Inputs and targets by task.

    Raises:
        TargetError: if the batch is something else.
        UnknownTaskError: if there is a target without a head.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TargetError(
            f"a batch of the loader must be a pair of inputs and targets by task, as in "
            f"(x, {{'age': y}}), got {type(batch).__name__}. Several inputs are a tuple in first "
            f"place: ((x1, x2), targets)."
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


def _labelled(task: str, head: Layout, features: Tensor, target: Tensor) -> Rows:
    """Features and labels of a head, checked.

    Raises:
        TargetError: for labels of another shape, or that are none of the head's.
    """
    data, outputs = len(features), head.outputs
    if head.kind == "multiclass":
        return Rows(features, *_classes(task, data, outputs, target, head.channels_first))
    if target.dim() > 2 and head.channels_first and target.shape[1] == outputs:
        target = target.movedim(1, -1)
    if target.numel() != data * outputs:
        raise TargetError(
            f"task {task!r}: {list(target.shape)} targets for {data} data of {outputs} outputs. "
            f"Pass one for each output, NaN where there is none."
        )
    y = target.reshape(data, outputs).to(torch.promote_types(features.dtype, torch.float32))
    bad = y.isinf() if head.kind == "regression" else (y < 0) | (y > 1)
    present = ~y.isnan()
    if bool(bad.any()):
        what = "finite" if head.kind == "regression" else "between 0 and 1"
        raise TargetError(f"task {task!r}: targets must be {what}, or NaN where missing.")
    if bool(present.all()):
        return Rows(features, y, None)
    return Rows(features, y.nan_to_num(0.0), present)


def _classes(
    task: str, data: int, classes: int, target: Tensor, channels_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the classes, and which data have a label."""
    if target.is_floating_point() and target.numel() == data * classes:
        y = target.movedim(1, -1) if channels_first and target.dim() > 2 else target
        y = y.reshape(data, classes)
        present = ~y.isnan().any(1)
        valid = ((y >= 0) & (y <= 1)).all(1) | ~present
        y = y.nan_to_num(0.0)
    elif target.numel() == data:
        index = target.reshape(data)
        present = ~index.isnan() if index.is_floating_point() else torch.ones_like(index) > 0
        index = index.nan_to_num(-100).long() if index.is_floating_point() else index.long()
        present &= index != -100
        valid = ((index >= 0) & (index < classes)) | ~present
        index = index.clamp(0, classes - 1)
        y = torch.zeros(data, classes, device=target.device).scatter_(1, index[:, None], 1.0)
    else:
        raise TargetError(
            f"task {task!r}: {list(target.shape)} targets for {data} data of {classes} classes. "
            f"Pass class indices, -100 where there is none, or probabilities of all classes."
        )
    if not bool(valid.all()):
        raise TargetError(
            f"task {task!r}: class indices must lie in 0 to {classes - 1}, probabilities between "
            f"0 and 1; -100 or NaN where there is none."
        )
    return y, None if bool(present.all()) else present

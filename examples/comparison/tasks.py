"""Tasks of a benchmark: their losses and what they are measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.training import Losses

Kind = Literal["regression", "binary", "multiclass"]
Outputs = dict[str, Tensor]
Metric = Literal["mae", "rmse", "angle", "accuracy", "auroc", "f1", "miou"]
LOWER_IS_BETTER: tuple[Metric, ...] = ("mae", "rmse", "angle")
BINS = 15  # of the calibration error
_KINDS: tuple[Kind, ...] = ("regression", "binary", "multiclass")


@dataclass(frozen=True)
class Task:
    """A task."""

    name: str  # its name
    kind: Kind  # its likelihood. Tasks of a benchmark are sorted: regression, binary, multi-class
    metric: Metric  # what Δm and the mean rank use
    unit: str = ""  # of a regression target
    classes: int = 1  # of a multi-class task; of a regression of vectors its dimensions

    @property
    def title(self) -> str:
        """Name, metric and unit, for a column."""
        return f"{self.name}, {self.metric.upper()}" + (f" [{self.unit}]" if self.unit else "")

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher value of the metric is better."""
        return self.metric not in LOWER_IS_BETTER


class HeadGroup(NamedTuple):
    """A linear head: its name, the kind of its tasks, the layer, and how many tasks it serves.

    The layer is a 1×1 convolution where outputs are maps.

    Losses follow the order of the groups, and within a group that of its outputs.
    """

    name: str
    kind: Kind
    module: nn.Linear | nn.Conv2d
    tasks: int


def grouped(tasks: Sequence[Task]) -> Iterator[tuple[str, Kind, slice]]:
    """Heads for the tasks: one for all of a kind; a task of several outputs has its own.

    Yields:
        Name of the head, kind, and which tasks it serves.

    Raises:
        ValueError: If the tasks are not sorted by kind.
    """
    places = [(_KINDS.index(task.kind), task.classes > 1) for task in tasks]
    if places != sorted(places):
        raise ValueError("sort the tasks of a benchmark: regression, binary, multi-class")
    start = 0
    for name, own in groupby(tasks, lambda t: t.kind if t.classes == 1 else t.name):
        stop = start + len(list(own))
        yield name, tasks[start].kind, slice(start, stop)
        start = stop


def criterion(tasks: Sequence[Task]) -> Callable[[Outputs, Tensor], Losses]:
    """Squared error, binary cross-entropy or cross-entropy of each task, mean over the batch.

    The result takes outputs by head and targets ``(B, K)``; a class is a whole number there, and a
    label of a regression that is NaN is missing: the mean is over the others.
    """
    groups = list(grouped(tasks))
    names = [task.name for task in tasks]

    def losses(outputs: Outputs, y: Tensor) -> Losses:
        values: list[Tensor] = []
        for head, kind, which in groups:
            target = y[:, which]
            if kind == "regression":
                values += _squared_errors(outputs[head], target).unbind()
            elif kind == "binary":
                values += (
                    F.binary_cross_entropy_with_logits(outputs[head], target, reduction="none")
                    .mean(0)
                    .unbind()
                )
            else:
                values.append(F.cross_entropy(outputs[head], target[:, 0].long()))
        return dict(zip(names, values, strict=True))

    return losses


def _squared_errors(outputs: Tensor, target: Tensor) -> Tensor:
    missing = target.isnan()
    if not missing.any():
        return F.mse_loss(outputs, target, reduction="none").mean(0)
    errors = torch.where(missing, 0.0, outputs - target.nan_to_num()).square()
    return errors.sum(0) / (~missing).sum(0).clamp(min=1)


def by_task(tasks: Sequence[Task], outputs: Outputs) -> list[Tensor]:
    """Outputs of each task: ``(n,)``, or ``(n, C)`` for a multi-class task."""
    result: list[Tensor] = []
    for head, kind, _ in grouped(tasks):
        result += [outputs[head]] if kind == "multiclass" else outputs[head].unbind(1)
    return result


def measure(
    tasks: Sequence[Task], outputs: Outputs, y: Tensor, scale: Tensor
) -> list[dict[str, float]]:
    """Metrics of each task: MAE and RMSE, or accuracy, AUROC and F1 (binary), ECE and Brier score.

    Args:
        tasks: The tasks.
        outputs: By head, for n data.
        y: Targets, shape ``(n, K)``.
        scale: What a regression target was divided by, shape ``(K,)``.

    Returns:
        A dictionary per task; errors of a regression are in its unit.
    """
    measured = []
    for k, (task, output) in enumerate(zip(tasks, by_task(tasks, outputs), strict=True)):
        if task.kind == "regression":
            error = (output - y[:, k]) * scale[k]
            mae, rmse = error.abs().mean(), error.square().mean().sqrt()
            measured.append({"mae": mae.item(), "rmse": rmse.item()})
        elif task.kind == "binary":
            measured.append(_binary(output.sigmoid(), y[:, k].long()))
        else:
            measured.append(_multiclass(output.softmax(1), y[:, k].long()))
    return measured


def _binary(p: Tensor, y: Tensor) -> dict[str, float]:
    guess = p > 0.5
    return {
        "accuracy": (guess == y).double().mean().item(),
        "f1": (2 * (guess & (y == 1)).sum() / (guess.sum() + y.sum()).clamp(min=1)).item(),
        "auroc": area_under_roc(p, y),
        "ece": calibration_error(p, y),
        "brier": (p - y).square().mean().item(),
    }


def _multiclass(p: Tensor, y: Tensor) -> dict[str, float]:
    confidence, guess = p.max(1)
    return {
        "accuracy": (guess == y).double().mean().item(),
        "ece": calibration_error(confidence, guess == y),
        "brier": (p - F.one_hot(y, p.shape[1])).square().sum(1).mean().item(),
    }


def area_under_roc(p: Tensor, y: Tensor) -> float:
    """Chance that a positive is ranked above a negative; a half where one of them is missing.

    Args:
        p: Scores, ``(n,)``.
        y: Labels, 0 or 1, ``(n,)``.
    """
    positive = y > 0.5
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if ones == 0 or zeros == 0:
        return 0.5
    _, place, count = p.unique(return_inverse=True, return_counts=True)
    rank = count.cumsum(0).double() - (count - 1) / 2  # ties share the mean of their ranks
    above = rank[place][positive].sum().item() - ones * (ones + 1) / 2
    return above / (ones * zeros)


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over bins, by their share."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = confidence.double() - correct.double()
    sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, gap)
    return sums.abs().sum().item() / len(confidence)


def primary(tasks: Sequence[Task], measured: Sequence[dict[str, float]]) -> list[float]:
    """The metric of each task that Δm uses, length K."""
    return [values[task.metric] for task, values in zip(tasks, measured, strict=True)]


def joint_accuracy(tasks: Sequence[Task], outputs: Outputs, y: Tensor) -> float:
    """Accuracy of the best-scoring of tasks that exclude each other (one against the rest)."""
    scores = torch.stack(by_task(tasks, outputs), 1)
    return (scores.argmax(1) == y.argmax(1)).double().mean().item()

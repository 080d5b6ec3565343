"""Task weights as scalars for experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["HasTaskWeights", "ScalarWriter", "log_task_weights", "task_weight_scalars"]


class HasTaskWeights(Protocol):
    """A :class:`bayesagg.BayesAgg` or :class:`bayesagg.BayesAggWrapper`."""

    @property
    def task_weights(self) -> Mapping[str, Tensor]:
        """Mean weight per output of the last step, by task."""


class ScalarWriter(Protocol):
    """What is needed of ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> Any:
        """Write one number."""


def task_weight_scalars(source: HasTaskWeights, prefix: str = "task_weights/") -> dict[str, float]:
    """Weights of the last step by name, ``task_weights/<task>``.

    A task with several outputs has one entry per output, ``task_weights/<task>/<output>``; all
    entries sum to one.

    Args:
        source: engine or wrapper.
        prefix: of every name.

    Raises:
        ValueError: if an output of a task has the name of another task.
    """
    scalars: dict[str, float] = {}
    for name, weights in source.task_weights.items():
        values = weights.tolist()
        for i, value in enumerate(values):
            key = f"{prefix}{name}" if len(values) == 1 else f"{prefix}{name}/{i}"
            if key in scalars:
                raise ValueError(
                    f"two weights would be logged as {key!r}: an output of one task has the name "
                    f"of another. Rename one of the tasks."
                )
            scalars[key] = value
    return scalars


def log_task_weights(
    writer: ScalarWriter, source: HasTaskWeights, step: int, prefix: str = "task_weights/"
) -> None:
    """Write the weights of the last step to TensorBoard, or to anything with ``add_scalar``.

    Args:
        writer: such as ``torch.utils.tensorboard.SummaryWriter()``.
        source: engine or wrapper.
        step: number of the step in the plot.
        prefix: of every name.
    """
    for name, value in task_weight_scalars(source, prefix).items():
        writer.add_scalar(name, value, step)

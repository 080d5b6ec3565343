"""Metrics that compare multi-task methods: Δm and the mean rank.

Both take one number per task (a mean absolute error, an accuracy, an AUC) and say nothing about how
it was measured. Δm is dominated by tasks whose single-task error is tiny, so report the mean rank
and the values per task beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["delta_m", "mean_rank"]


def delta_m(
    method_values: Tensor | npt.ArrayLike,
    single_task_values: Tensor | npt.ArrayLike,
    higher_is_better: bool | Sequence[bool] = False,
) -> float:
    r"""Average relative difference to single-task learning, in percent; lower is better.

    .. math:: \Delta_m = \frac{100}{K} \sum_{k=1}^{K} (-1)^{\delta_k} (M_m^k - M_s^k) / M_s^k

    with :math:`\delta_k = 1` where a higher criterion is better (Maninis et al., "Attentive
    single-tasking of multiple tasks", 2019; paper, Sec. 5, "Evaluation metric"). Negative: the
    method beats the single-task models on average.

    Args:
        method_values: Criterion of the method per task, shape ``(K,)``, in any unit.
        single_task_values: Criterion of the single-task models, shape ``(K,)``, in the same units,
            all positive.
        higher_is_better: For each task (or all) whether a higher criterion is better.

    Returns:
        Δm in percent.

    Raises:
        ValueError: If shapes differ or are not ``(K,)`` with ``K >= 1``, if a value is not finite,
            or if a single-task value is not positive, where a relative difference has no meaning.
    """
    method, single = _values(method_values, 1), _values(single_task_values, 1)
    if method.shape != single.shape:
        raise ValueError(
            f"method_values has {len(method)} tasks and single_task_values {len(single)}; "
            "pass one value per task in both, in the same order"
        )
    if not (single > 0).all():
        task = int((single <= 0).nonzero()[0])
        raise ValueError(
            f"the single-task value of task {task} is {single[task].item():g}; Δm divides by it, "
            "so it must be positive: leave the task out or choose another criterion"
        )
    sign = 1.0 - 2.0 * _flags(higher_is_better, len(single)).double()
    return float(100.0 * (sign * (method - single) / single).mean())


def mean_rank(
    table: Tensor | npt.ArrayLike, higher_is_better: bool | Sequence[bool] = False
) -> Tensor:
    """Rank of each method among all methods, averaged over tasks; lower is better.

    Methods that tie on a task share the average of their ranks, so the ranks of a task always sum
    to ``M (M + 1) / 2``. A mean rank depends on which methods are in the table.

    Args:
        table: Criterion per method and task, shape ``(M, K)``, in any unit per task.
        higher_is_better: For each task (or all) whether a higher criterion is better.

    Returns:
        Mean ranks between 1 (best on every task) and ``M``, shape ``(M,)``, float64.

    Raises:
        ValueError: If the table is not of shape ``(M, K)`` with ``M, K >= 1`` or has a value that
            is not finite.
    """
    values = _values(table, 2)
    values = torch.where(_flags(higher_is_better, values.shape[1]), -values, values)
    better = (values[None] < values[:, None]).sum(1)
    tied = (values[None] == values[:, None]).sum(1)  # counts the method itself
    return (better + (tied + 1) / 2).double().mean(1)


def _values(values: Tensor | npt.ArrayLike, dimensions: int) -> Tensor:
    """Take numbers as a detached float64 tensor on the CPU with that many dimensions."""
    tensor = torch.as_tensor(values).detach().to("cpu", torch.float64)
    shape = "(tasks,)" if dimensions == 1 else "(methods, tasks)"
    if tensor.ndim != dimensions or tensor.numel() == 0:
        raise ValueError(f"expected values of shape {shape}, got shape {tuple(tensor.shape)}")
    if not tensor.isfinite().all():
        place = tuple((~tensor.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"the value at {place} of {shape} is not finite; a metric needs numbers")
    return tensor


def _flags(higher_is_better: bool | Sequence[bool], tasks: int) -> Tensor:
    """Turn one flag or one per task into a boolean tensor of shape ``(tasks,)``."""
    if isinstance(higher_is_better, bool | np.bool_):
        return torch.full((tasks,), bool(higher_is_better))
    if len(higher_is_better) != tasks:
        raise ValueError(
            f"higher_is_better has {len(higher_is_better)} entries for {tasks} tasks; "
            "pass one bool per task, or a single bool for all"
        )
    return torch.tensor(list(higher_is_better), dtype=torch.bool)

"""Running means that likelihoods learn their scales from."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.errors import CheckpointError

__all__ = ["RunningMean"]


class RunningMean:
    """Exponential running mean of a value per task, over the steps in which the task has labels.

    Args:
        decay: of the weight of a step with every later one.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._sums: Tensor | None = None  # of the weighted values, and of their weights, [2, K]

    def update(self, values: Tensor, seen: Tensor) -> None:
        """Take in ``values``, ``[K]``, of the tasks ``seen``, ``[K]``."""
        new = torch.stack([values, torch.ones_like(values)])
        old = torch.zeros_like(new) if self._sums is None else self._sums
        self._sums = torch.where(seen, self.decay * old + (1 - self.decay) * new, old)

    def mean(self, otherwise: Tensor) -> Tensor:
        """The mean, ``[K]``; ``otherwise`` for tasks that have not been seen."""
        if self._sums is None:
            return otherwise
        total, weight = self._sums
        return torch.where(weight > 0, total / weight, otherwise)

    def state(self) -> Tensor | None:
        """Copy of the sums, ``[2, K]``."""
        return None if self._sums is None else self._sums.clone()

    def load(
        self,
        state: Tensor | None,
        names: list[str],
        tasks: int,
        like: tuple[torch.device, torch.dtype],
    ) -> None:
        """Inverse of :meth:`state`.

        Raises:
            CheckpointError: if it is of another number of tasks.
        """
        if state is not None and tuple(state.shape) != (2, tasks):
            raise CheckpointError(
                f"tasks {', '.join(map(repr, names))}: the checkpoint's noise estimate has "
                f"shape {tuple(state.shape)}; it was saved from other heads."
            )
        self._sums = None if state is None else state.to(*like, copy=True)

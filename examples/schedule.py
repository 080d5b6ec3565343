"""What happens between epochs: the learning rate, the epoch that is evaluated, early stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

if TYPE_CHECKING:
    from examples.training import TrainSettings

# Shares of the epochs after which the rate drops, and the factor.
_DROPS = {"constant": ((), 1.0), "half": ((0.5,), 0.5), "steps": ((0.6, 0.8), 0.1)}
SCHEDULES = ("cosine", "plateau", *_DROPS)
SELECTIONS = ("last", "best")
# Those of Navon et al. (2022), whose protocol the paper follows for QM9.
_PLATEAU = {"factor": 0.7, "patience": 5, "min_lr": 1e-5}


class Schedule:
    """The learning rate by the name of its schedule.

    Args:
        settings: Names the schedule.
        optimizer: Its learning rates are changed.
        steps: Steps per epoch.
    """

    def __init__(
        self, settings: TrainSettings, optimizer: torch.optim.Optimizer, steps: int
    ) -> None:
        self._name = settings.schedule
        if settings.schedule == "cosine":
            self._scheduler = lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps)
        elif settings.schedule == "plateau":
            # Scores are logarithms: a difference of 1e-4 is the relative one that is the default.
            self._scheduler = lr_scheduler.ReduceLROnPlateau(
                optimizer, threshold=1e-4, threshold_mode="abs", **_PLATEAU
            )
        else:
            shares, factor = _DROPS[settings.schedule]
            drops = [round(share * settings.epochs) for share in shares]
            self._scheduler = lr_scheduler.MultiStepLR(optimizer, drops, factor)

    def after_step(self) -> None:
        """Follow the cosine."""
        if self._name == "cosine":
            self._scheduler.step()

    def after_epoch(self, scores: Sequence[float] | None) -> None:
        """Drop at the set epochs, or where the mean score no longer falls."""
        if self._name == "plateau":
            self._scheduler.step(sum(scores) / len(scores))
        elif self._name != "cosine":
            self._scheduler.step()


class Selection:
    """Keeps the parameters of the epoch with the lowest score, and says when to stop.

    A model of independent networks says so by a method ``network_tensors``: parameters and buffers
    of each, in the order of the tasks. Each has the epoch with the lowest score of its own task.

    Args:
        settings: Selection and patience.
        model: The model; it is changed by :meth:`restore` only.
    """

    def __init__(self, settings: TrainSettings, model: nn.Module) -> None:
        self._settings, self._model = settings, model
        count = len(self._networks())
        self._lowest = [math.inf] * count
        self._kept: list[list[Tensor]] = [[] for _ in range(count)]
        self.epochs = [0] * count  # of the lowest scores, counted from 1
        self._epoch = 0

    def _networks(self) -> list[list[Tensor]]:
        split = getattr(self._model, "network_tensors", None)
        # The values of a state are the tensors of the model, not copies.
        return split() if split else [list(self._model.state_dict().values())]

    def after_epoch(self, scores: Sequence[float] | None) -> bool:
        """Note the scores of the tasks; returns whether to stop."""
        self._epoch += 1
        if scores is None:
            return False
        networks = self._networks()
        own = scores if len(networks) > 1 else [sum(scores) / len(scores)]
        for k, (score, tensors) in enumerate(zip(own, networks, strict=True)):
            if score < self._lowest[k]:
                self._lowest[k], self.epochs[k] = score, self._epoch
                if self._settings.selection == "best":
                    self._kept[k] = [tensor.clone() for tensor in tensors]
        patience = self._settings.patience
        return patience is not None and self._epoch - max(self.epochs) >= patience

    @torch.no_grad()
    def restore(self) -> list[int]:
        """Put back what is to be evaluated.

        Returns:
            The epoch of each network; 0 where no score was a number, and nothing is put back.
        """
        if self._settings.selection == "last":
            return [self._epoch] * len(self.epochs)
        if 0 in self.epochs:
            return self.epochs
        for tensors, kept in zip(self._networks(), self._kept, strict=True):
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        return self.epochs

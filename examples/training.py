"""One training loop for every method: what differs between methods is the update.

An update takes the losses of a batch and changes the parameters. Data, order of batches, schedule,
warm-up, gradient clipping and the rule for the epoch that is evaluated are the same for all, so
that no method of a comparison has them to itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from bayesagg import LikelihoodRule

Losses = dict[str, Tensor]
Criterion = Callable[[Any, Tensor], Losses]
Scores = Callable[[], Sequence[float]]
OPTIMIZERS = ("adam", "sgd")
# Shares of the epochs after which the rate drops, and the factor.
_DROPS = {"constant": ((), 1.0), "half": ((0.5,), 0.5), "steps": ((0.6, 0.8), 0.1)}
SCHEDULES = ("cosine", "plateau", *_DROPS)
SELECTIONS = ("last", "best")
# Those of Navon et al. (2022), whose protocol the paper follows for QM9.
_PLATEAU = {"factor": 0.7, "patience": 5, "min_lr": 1e-5}


@dataclass(frozen=True)
class TrainSettings:
    """What all methods share.

    Raises:
        ValueError: If one of these names is not known, or ``patience`` is below 1.
    """

    epochs: int = 30  # passes over the training part
    # Steps that minimise the sum of the losses first, whatever the method; by default those of the
    # library's rule. The paper's arm has epochs of its own instead
    warmup_steps: int = LikelihoodRule.warmup
    batch_size: int = 120  # data per step
    learning_rate: float = 1e-3  # at the first step
    weight_decay: float = 0.0  # A multiple of the parameters that is added to their gradient
    optimizer: str = "adam"  # ``adam``, or ``sgd`` with momentum 0.9
    # Largest norm of the gradient of all parameters together; ``None``: no clipping
    clip_norm: float | None = None
    seed: int = 0  # seed of the weights and of the order of the batches
    # Of the learning rate. ``cosine``: half a cosine to 0 at the last step; ``steps``: times 0.1
    # after 60 % and 80 % of the epochs; ``half``: times 0.5 after half of them; ``constant``: as it
    # is; ``plateau``: times 0.7, down to 1e-5, after more than 5 epochs in which the validation
    # score was not lower than before
    schedule: str = "cosine"
    # Which epoch is evaluated: the ``last``, or the ``best`` by validation score
    selection: str = "last"
    patience: int | None = None  # stop after so many epochs without a lower score; ``None``: never

    def __post_init__(self) -> None:
        names = (("schedule", SCHEDULES), ("selection", SELECTIONS), ("optimizer", OPTIMIZERS))
        for name, known in names:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is at least 1 epoch, not {self.patience}")

    @property
    def needs_scores(self) -> bool:
        """Whether the validation part is looked at after each epoch."""
        return self.schedule == "plateau" or self.selection == "best" or self.patience is not None

    def steps_per_epoch(self, data: Any) -> int:
        """Optimizer steps in an epoch; the last batch may be smaller."""
        return math.ceil(len(data.train) / self.batch_size)


class Part(Protocol):
    """Data that batches are taken from: tensors, or anything that can be collated."""

    def __len__(self) -> int:
        """Number of data."""

    def batch(self, rows: Tensor) -> tuple[Any, Tensor]:
        """Inputs, as the model takes them, and targets, ``(B, K)``, of the given rows."""


class DivergedError(ArithmeticError):
    """A loss is no longer finite."""


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


@dataclass(frozen=True)
class History:
    """What a training leaves besides the model."""

    seconds: float  # wall time of all epochs, without the validation after them
    # Median over the epochs (but the first, which has the warm-up) of the mean time of a step, in
    # seconds
    seconds_per_step: float
    # Mean task weights of each epoch as shares that sum to 1, ``(epochs, K)``; rows are empty for a
    # method without weights
    weights: list[list[float]]
    # Epoch whose parameters the model has, counted from 1; of each network, where they are
    # independent
    evaluated: list[int]


def train(
    model: nn.Module,
    update: Any,
    data: Any,
    criterion: Criterion,
    settings: TrainSettings,
    on_epoch: Callable[[], None] = lambda: None,
    scores: Scores | None = None,
) -> History:
    """Train ``model`` in place.

    Args:
        model: Maps inputs to outputs.
        update: The method, such as :class:`examples.methods.LinearScalarization`.
        data: Has a :class:`Part` ``train``; nothing else is read.
        criterion: Maps what the model returns and targets ``(B, K)`` to a loss per task.
        settings: What all methods share.
        on_epoch: Called after each epoch, for a progress bar.
        scores: Validation score of each task for the model as it is, the lower the better: a
            logarithm, so that a difference is a relative change. Called after each epoch by
            settings that need it.

    Returns:
        Times and task weights.

    Raises:
        DivergedError: If a loss is not finite at the end of an epoch, or no score ever is.
        ValueError: If the settings need scores and there are none.
    """
    if settings.needs_scores and scores is None:
        raise ValueError("these settings need the validation scores of the tasks: pass scores=")
    steps = settings.steps_per_epoch(data)
    schedule, selection = Schedule(settings, update.optimizer, steps), Selection(settings, model)
    generator = torch.Generator().manual_seed(settings.seed)
    seconds: list[float] = []
    weights: list[list[float]] = []
    for _ in range(settings.epochs):
        start = time.perf_counter()
        model.train()
        shares: list[Tensor] = []
        for rows in torch.randperm(len(data.train), generator=generator).split(settings.batch_size):
            x, y = data.train.batch(rows)
            losses = criterion(model(x), y)
            update.step(losses)
            update.after_step(lambda x=x, y=y: criterion(model(x), y))
            schedule.after_step()
            step_weights = update.task_weights()
            if step_weights is not None:
                shares.append(step_weights / step_weights.sum())
        for task, loss in losses.items():
            if not loss.isfinite():
                raise DivergedError(f"the loss of {task} is {loss.item()}")
        weights.append(torch.stack(shares).mean(0).tolist() if shares else [])
        seconds.append(time.perf_counter() - start)
        found = scores() if scores and settings.needs_scores else None
        schedule.after_epoch(found)
        on_epoch()
        if selection.after_epoch(found):
            break
    evaluated = selection.restore()
    if 0 in evaluated:
        raise DivergedError("the validation score of no epoch is a number")
    measured = seconds[1:] or seconds
    return History(sum(seconds), median(measured) / steps, weights, evaluated)

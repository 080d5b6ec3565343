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

from bayesagg import LikelihoodRule
from examples.schedule import SCHEDULES, SELECTIONS, Schedule, Selection

Losses = dict[str, Tensor]
Criterion = Callable[[Any, Tensor], Losses]
Scores = Callable[[], Sequence[float]]
OPTIMIZERS = ("adam", "sgd")


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

"""Methods that weigh the losses: UW, RLW, DWA, FAMO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import RandomWeighting

from examples.methods import LinearScalarization
from examples.training import Losses


class UncertaintyWeighting(LinearScalarization):
    """UW (Kendall et al., 2018): the sum of exp(-s_k) L_k + s_k, with learned log-variances s.

    Args:
        rate: Learning rate of the log-variances, as a multiple of that of the model.
    """

    weighted = True

    def __init__(self, *shared: Any, rate: float = 1.0) -> None:
        super().__init__(*shared)
        self.log_variances = torch.nn.Parameter(torch.zeros(self.tasks))
        own = {"lr": rate * self.settings.learning_rate, "weight_decay": 0.0}
        self.optimizer.add_param_group({"params": [self.log_variances], **own})

    def objective(self, values: Tensor) -> Tensor:
        """Sum of the weighted losses and the log-variances."""
        weights = (-self.log_variances).exp()
        self.weights = weights.detach()
        return (weights * values + self.log_variances).sum()


class RandomLossWeighting(LinearScalarization):
    """RLW (Lin et al., 2022): weights drawn anew in each step, with mean one."""

    weighted = True

    def __init__(self, *shared: Any) -> None:
        super().__init__(*shared)
        self._draw = RandomWeighting()

    def objective(self, values: Tensor) -> Tensor:
        """Weighted sum of the losses."""
        self.weights = len(values) * self._draw(values.detach()[:, None])
        return (self.weights * values).sum()


class DynamicWeightAverage(LinearScalarization):
    """DWA (Liu et al., 2019): weights follow the ratio of the mean losses of the last two epochs.

    Args:
        temperature: T; the larger, the closer to equal weights.
    """

    weighted = True

    def __init__(self, *shared: Any, temperature: float = 2.0) -> None:
        super().__init__(*shared)
        self._temperature = temperature
        self._epochs: list[Tensor] = []  # mean losses of the last two epochs
        self._current: list[Tensor] = []

    def step(self, losses: Losses) -> None:
        """Step, and note the losses, those of the first epochs too."""
        super().step(losses)
        self._current.append(torch.stack(list(losses.values())).detach())
        if len(self._current) == self.steps_per_epoch:
            self._epochs = [*self._epochs[-1:], torch.stack(self._current).mean(0)]
            self._current = []

    def objective(self, values: Tensor) -> Tensor:
        """Weighted sum of the losses; the weights sum to K, and are ones in the second epoch."""
        self.weights = torch.ones_like(values)
        if len(self._epochs) == 2:
            ratio = self._epochs[1] / self._epochs[0]
            self.weights = len(values) * (ratio / self._temperature).softmax(0)
        return (self.weights * values).sum()


class FAMO(LinearScalarization):
    """FAMO (Liu et al., 2023): all log losses are to fall at the same rate.

    The logits ξ of the weights z = softmax(ξ) are trained by Adam on how much each log loss of the
    batch fell in the step; the losses of the model have weights ∝ z_k / L_k that sum to K.

    Args:
        rate: Learning rate of the logits.
        decay: Weight decay of the logits, γ.
    """

    weighted = True

    def __init__(self, *shared: Any, rate: float = 0.025, decay: float = 1e-3) -> None:
        super().__init__(*shared)
        self.logits = torch.nn.Parameter(torch.zeros(self.tasks))
        self._logits_optimizer = torch.optim.Adam([self.logits], lr=rate, weight_decay=decay)
        self._before: Tensor | None = None

    def objective(self, values: Tensor) -> Tensor:
        """Weighted sum of the log losses."""
        self._before = values.detach()
        z = self.logits.detach().softmax(0)
        scale = len(values) / (z / self._before).sum()
        self.weights = scale * z / self._before
        return (scale * z * values.log()).sum()

    def after_step(self, losses_now: Callable[[], Losses]) -> None:
        """Train the logits on the fall of the log losses."""
        if self._before is None:  # still minimising the sum
            return
        with torch.no_grad():
            now = torch.stack(list(losses_now().values()))
        fall = self._before.log() - now.log()
        self._logits_optimizer.zero_grad()
        (self.logits.softmax(0) * fall).sum().backward()
        self._logits_optimizer.step()

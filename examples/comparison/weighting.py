"""Methods that weigh the losses, by TorchJD's scalarizers: UW, RLW, DWA, FAMO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchjd import scalarization

from examples.methods import LinearScalarization
from examples.training import Losses


class Scalarization(LinearScalarization):
    """The base: the scalarizer's derivative with respect to a loss is the weight of its task."""

    weighted = True
    scalarizer: nn.Module  # maps the losses, shape ``(K,)``, to a scalar
    factor: float  # brings it to the scale of linear scalarization

    def objective(self, values: Tensor) -> Tensor:
        """The scaled scalar."""
        total = self.factor * self.scalarizer(values.requires_grad_())
        [self.weights] = torch.autograd.grad(total, values, retain_graph=True)
        return total


class UncertaintyWeighting(Scalarization):
    """UW (Kendall et al., 2018): the sum of exp(-s_k) L_k + s_k, with learned log-variances s.

    Args:
        rate: Learning rate of the log-variances, as a multiple of that of the model.
    """

    def __init__(self, *shared: Any, rate: float = 1.0) -> None:
        super().__init__(*shared)
        self.scalarizer, self.factor = scalarization.UW(self.tasks), 2
        own = {"lr": rate * self.settings.learning_rate, "weight_decay": 0.0}
        self.optimizer.add_param_group({"params": [self.scalarizer.log_var], **own})


class RandomLossWeighting(Scalarization):
    """RLW (Lin et al., 2022): weights drawn anew in each step, with mean one."""

    def __init__(self, *shared: Any) -> None:
        super().__init__(*shared)
        self.scalarizer, self.factor = scalarization.Random(), self.tasks


class DynamicWeightAverage(Scalarization):
    """DWA (Liu et al., 2019): weights follow the ratio of the mean losses of the last two epochs.

    They sum to K, and are ones in the first two epochs.

    Args:
        temperature: T; the larger, the closer to equal weights.
    """

    def __init__(self, *shared: Any, temperature: float = 2.0) -> None:
        super().__init__(*shared)
        self.scalarizer, self.factor = scalarization.DWA(temperature), 1
        self._steps = 0

    def step(self, losses: Losses) -> None:
        """Step; the scalarizer notes the losses, those of the warm-up too."""
        super().step(losses)
        if self.warming_up:
            self.scalarizer(torch.stack(list(losses.values())))
        self._steps += 1
        if self._steps % self.steps_per_epoch == 0:
            self.scalarizer.step()


class FAMO(Scalarization):
    """FAMO (Liu et al., 2023): all log losses are to fall at the same rate.

    The logits ξ of the weights z = softmax(ξ) are trained by Adam on how much each log loss of the
    batch fell in the step; the losses of the model have weights ∝ z_k / L_k that sum to K.

    Args:
        rate: Learning rate of the logits.
        decay: Weight decay of the logits, γ.
    """

    def __init__(self, *shared: Any, rate: float = 0.025, decay: float = 1e-3) -> None:
        super().__init__(*shared)
        self.scalarizer = scalarization.FAMO(self.tasks, lr=rate, weight_decay=decay)
        self.factor = self.tasks

    def after_step(self, losses_now: Callable[[], Losses]) -> None:
        """Train the logits on the fall of the log losses."""
        if not self.warming_up:
            with torch.no_grad():
                self.scalarizer.update(torch.stack(list(losses_now().values())))

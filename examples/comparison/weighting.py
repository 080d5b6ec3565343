"""Methods that weigh the losses: UW, RLW, DWA, FAMO; UW-SO, STCH and GO4Align of 2024 and later.

Weights that are given up to a factor sum to K, as in :mod:`examples.comparison.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torchjd import scalarization

from examples.comparison.gradients import sums_to
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


class UncertaintySoftOptimal(LinearScalarization):
    """UW-SO (Kirchdorfer et al., 2024): weights are the softmax of 1 / (T L_k).

    Args:
        temperature: T.
    """

    weighted = True

    def __init__(self, *shared: Any, temperature: float = 20.0) -> None:
        super().__init__(*shared)
        self._temperature = temperature

    def weigh(self, values: Tensor) -> Tensor:
        """K times the softmax."""
        return len(values) * (1 / (self._temperature * values.clamp_min(1e-12))).softmax(0)


class STCH(LinearScalarization):
    """STCH (Lin et al., 2024): a smooth maximum of the log losses over their first means.

    For an epoch the sum of the log losses is minimised, whose mean losses are the nadir.

    Args:
        mu: Smoothness; towards 0 the maximum.
    """

    def __init__(self, *shared: Any, mu: float = 1.0) -> None:
        super().__init__(*shared)
        self._smooth_maximum = scalarization.STCH(mu, torch.ones(self.tasks))
        self._seen: list[Tensor] = []
        self._nadir: Tensor | None = None

    def objective(self, values: Tensor) -> Tensor:
        """K times the smooth maximum."""
        if self._nadir is None:
            self._seen.append(values.detach())
            if len(self._seen) == self.steps_per_epoch:
                self._nadir = torch.stack(self._seen).mean(0)
            return values.log().sum()
        return len(values) * self._smooth_maximum((values / self._nadir).log())


class GO4Align(LinearScalarization):
    """GO4Align (Shen et al., 2024): inverse losses times learned risks, averaged within groups.

    Args:
        groups: Number of groups of tasks, found by K-means on their weights.
        rate: Step size of the risks.
    """

    weighted = True

    def __init__(self, *shared: Any, groups: int = 2, rate: float = 1e-4) -> None:
        super().__init__(*shared)
        self._groups, self._rate = min(groups, self.tasks), rate
        self._risks = torch.full((self.tasks,), 1 / self.tasks)

    def weigh(self, values: Tensor) -> Tensor:
        """Weights that sum to K."""
        risks = self._risks * (-self._rate * values).exp()
        self._risks = risks / risks.sum()
        weights = values.sum() / values * self._risks
        if self._groups < len(values):
            points = weights.double()[:, None].cpu().numpy()
            centres, group = kmeans2(points, self._groups, minit="++", rng=0, missing="warn")
            weights = torch.from_numpy(centres[group, 0]).to(values)
        return sums_to(weights, len(values))

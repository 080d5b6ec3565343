"""Methods of 2024 and later: UW-SO, STCH, GO4Align, ExcessMTL, DB-MTL, NTKMTL-SR.

As in :mod:`examples.comparison.gradients`, weights that are given up to a factor sum to K.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torchjd.aggregation import ExcessMTLWeighting
from torchjd.scalarization import STCH as SmoothTchebycheff

from examples.comparison.gradients import GradientWeighting, sums_to
from examples.methods import LinearScalarization
from examples.training import Losses


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
        self._smooth_maximum = SmoothTchebycheff(mu, torch.ones(self.tasks))
        self._seen: list[Tensor] = []
        self._nadir: Tensor | None = None

    def objective(self, values: Tensor) -> Tensor:
        """K times the smooth maximum."""
        if self._nadir is None:
            self._seen.append(values.detach())
            if len(self._seen) == self.steps_per_epoch:
                self._nadir = torch.stack(self._seen).mean(0)
            return values.log().sum()
        found: Tensor = self._smooth_maximum((values / self._nadir).log())
        return len(values) * found


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


class ExcessMTL(GradientWeighting):
    """ExcessMTL (He et al., 2024): weights grow with the estimated excess risk.

    Args:
        rate: Step size of the weights.
    """

    def __init__(self, *shared: Any, rate: float = 0.01) -> None:
        super().__init__(*shared)
        self._excess = ExcessMTLWeighting(robust_step_size=rate)

    def _weigh(self, rows: Tensor) -> Tensor:
        return len(rows) * self._excess(rows)


class DBMTL(GradientWeighting):
    """DB-MTL (Lin et al., 2023): running gradients of the log losses, stretched to one length.

    Args:
        decay: Weight of the past in the first step; it falls as 1 / √t.
    """

    def __init__(self, *shared: Any, decay: float = 0.9) -> None:
        super().__init__(*shared)
        self._decay, self._steps = decay, 0
        self._running: Tensor | None = None

    def backward(self, losses: Losses) -> None:
        """Fill the gradients of the heads, of the sum of log losses, and of shared parameters."""
        super().backward({name: loss.log() for name, loss in losses.items()})
        assert self._running is not None and self.weights is not None
        sizes = [p.numel() for p in self._shared]
        together = (self.weights @ self._running).split(sizes)
        for p, gradient in zip(self._shared, together, strict=True):
            p.grad = gradient.view_as(p)

    def _weigh(self, rows: Tensor) -> Tensor:
        self._steps += 1
        before = rows if self._running is None else self._running
        self._running = torch.lerp(rows, before, self._decay / self._steps**0.5)
        lengths = self._running.norm(dim=1)
        return lengths.max() / lengths.clamp_min(1e-8)


class NTKMTL(GradientWeighting):
    """NTKMTL-SR (Qin et al., 2025): weights (Σ λ / λ_k)^½ of the tangent kernels' eigenvalues.

    The kernel of a task is that of the gradients of ``parts`` mini-batches at the shared
    representation. Rows of the representation belong to one mini-batch each, so that it is
    diagonal, and its largest eigenvalue the largest squared length.

    Args:
        parts: Mini-batches that a batch is cut into.
    """

    def __init__(self, *shared: Any, parts: int = 4) -> None:
        super().__init__(*shared)
        self._parts = parts

    def backward(self, losses: Losses) -> None:
        """Fill all gradients, those of the heads too with the weights of the tasks."""
        values = torch.stack(list(losses.values()))
        assert self._h is not None
        h, self._h = self._h, None
        at_h = self._jacobian(values, [h], torch.eye(len(values), device=values.device))[0]
        squares = at_h.square().flatten(2).sum(2)
        largest = torch.stack([part.sum(1) for part in squares.chunk(self._parts, 1)]).amax(0)
        weights = (largest.sum() / largest.clamp_min(1e-30)).sqrt()
        self.weights = sums_to(weights, len(values))
        (self.weights * values).sum().backward()

"""Methods that weigh the gradients of the tasks; most weights are TorchJD's.

Of 2024 and later are ExcessMTL, DB-MTL and NTKMTL-SR.

The heads receive the gradient of their own losses, the shared layers a combination of the tasks'
gradients. Its scale, which is a matter of convention in most of these methods, is that of linear
scalarization: weights of methods that average sum to K. Adam forgets the scale of the first epochs
slowly, so another convention would be a lower learning rate in disguise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torchjd.aggregation import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ExcessMTLWeighting,
    IMTLGWeighting,
    PCGradWeighting,
)

from examples.methods import LinearScalarization
from examples.training import Losses

Floats = npt.NDArray[np.float64]


class GradientWeighting(LinearScalarization):
    """The base: per-task gradients, weights from their Gram matrix, the weighted sum.

    Args:
        representation: Compute the weights from the gradients at the shared representation (the
            methods with the suffix -UB) and not from those of the shared parameters.
    """

    weighted = True
    weighting: Any  # of TorchJD: weights from the Gram matrix, or from the gradients

    def __init__(self, *shared: Any, representation: bool = False) -> None:
        super().__init__(*shared)
        model = self.model
        self._representation = representation
        self._h: Tensor | None = None
        model.backbone.register_forward_hook(self._keep)
        self._heads = [p for group in model.groups for p in group.module.parameters()]
        heads = {id(p) for p in self._heads}
        self._shared = [p for p in model.parameters() if id(p) not in heads]

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._h = output

    def combine(self, gramian: Tensor) -> Tensor:
        """Weights of the tasks' gradients, shape ``(K,)``.

        Args:
            gramian: Inner products of the tasks' gradients, shape ``(K, K)``, divided by the mean
                of the diagonal. Its dtype, that of the gradients, sets the tolerance of inverses.
        """
        return self.weighting(gramian)

    def backward(self, losses: Losses) -> None:
        """Fill the gradients of the heads and of the shared parameters."""
        h, self._h = self._h, None
        values = torch.stack(list(losses.values()))
        at_h = self._jacobian(values, [h], torch.eye(len(values), device=values.device))[0]
        for p, g in zip(self._heads, torch.autograd.grad(values.sum(), self._heads), strict=True):
            p.grad = g
        if self._representation:
            self.weights = self._weigh(at_h.flatten(1))
            h.backward(torch.tensordot(self.weights, at_h, 1))
            return
        rows = self._jacobian(h, self._shared, at_h)
        self.weights = self._weigh(torch.cat([row.flatten(1) for row in rows], 1))
        for p, row in zip(self._shared, rows, strict=True):
            p.grad = torch.tensordot(self.weights, row, 1)

    def _jacobian(self, outputs: Tensor, inputs: list[Any], vectors: Tensor) -> list[Tensor]:
        """Vector-Jacobian product of each vector, ``(K, …)`` per input."""
        kwargs = {"is_grads_batched": True, "retain_graph": True}
        return list(torch.autograd.grad(outputs, inputs, vectors, **kwargs))

    def _weigh(self, rows: Tensor) -> Tensor:
        """Weights from the tasks' gradients, shape ``(K, n)``."""
        gramian = rows @ rows.T
        size = gramian.diagonal().mean()
        if not size.isfinite() or size == 0:
            return rows.new_ones(len(rows))  # a gradient of zero has no direction to choose
        return self.combine(gramian / size).to(rows)


class MGDA(GradientWeighting):
    """MGDA (Désidéri, 2012; Sener and Koltun, 2018): the point of smallest norm in the hull.

    Args:
        normalize: Divide each task's gradient by its norm first.
    """

    def __init__(self, *shared: Any, representation: bool = False, normalize: bool = False) -> None:
        super().__init__(*shared, representation=representation)
        self._normalize = normalize

    def combine(self, gramian: Tensor) -> Tensor:
        """K times the convex weights, of the normalised gradients where asked for."""
        if not self._normalize:
            return len(gramian) * smallest_norm(gramian)
        norms = gramian.diagonal().sqrt().clamp_min(1e-12)
        weights = smallest_norm(gramian / norms / norms[:, None]) / norms
        return sums_to(weights, len(gramian))


class PCGrad(GradientWeighting):
    """PCGrad (Yu et al., 2020): each gradient loses what conflicts with the others; the sum."""

    weighting = PCGradWeighting()


class Averaging(GradientWeighting):
    """The base of methods whose weights sum to one."""

    def combine(self, gramian: Tensor) -> Tensor:
        """K times the weights."""
        return len(gramian) * self.weighting(gramian)


class CAGrad(Averaging):
    """CAGrad (Liu et al., 2021): within a ball around the mean, the best for the worst-off task.

    Args:
        c: Radius of the ball as a share of the norm of the mean gradient.
    """

    def __init__(self, *shared: Any, c: float = 0.4) -> None:
        super().__init__(*shared)
        self.weighting = CAGradWeighting(c=c)


class IMTLG(Averaging):
    """IMTL-G (Liu et al., 2021): the combination projects equally on all tasks' gradients."""

    weighting = IMTLGWeighting()  # may be negative


class FairGrad(GradientWeighting):
    """FairGrad (Ban and Ji, 2024): G Gᵀ w = w^(-1/α); with α = 1 Nash-MTL (Navon et al., 2022).

    Args:
        alpha: Kind of fairness.
    """

    def __init__(self, *shared: Any, alpha: float = 2.0) -> None:
        super().__init__(*shared)
        self._alpha = alpha

    def combine(self, gramian: Tensor) -> Tensor:
        """The solution, scaled to sum to K."""
        return sums_to(fair_weights(gramian.double(), self._alpha), len(gramian))


class AlignedMTL(GradientWeighting):
    """Aligned-MTL (Senushkin et al., 2023): the sum after all singular values are made equal."""

    weighting = AlignedMTLWeighting()

    def combine(self, gramian: Tensor) -> Tensor:
        """The weights, scaled to absolute values that sum to K."""
        return sums_to(self.weighting(gramian), len(gramian))


class ExcessMTL(GradientWeighting):
    """ExcessMTL (He et al., 2024): weights grow with the estimated excess risk.

    Args:
        rate: Step size of the weights.
    """

    def __init__(self, *shared: Any, rate: float = 0.01) -> None:
        super().__init__(*shared)
        self.weighting = ExcessMTLWeighting(robust_step_size=rate)

    def _weigh(self, rows: Tensor) -> Tensor:
        return len(rows) * self.weighting(rows)


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
        h, self._h = self._h, None
        at_h = self._jacobian(values, [h], torch.eye(len(values), device=values.device))[0]
        squares = at_h.square().flatten(2).sum(2)
        largest = torch.stack([part.sum(1) for part in squares.chunk(self._parts, 1)]).amax(0)
        weights = (largest.sum() / largest.clamp_min(1e-30)).sqrt()
        self.weights = sums_to(weights, len(values))
        (self.weights * values).sum().backward()


def sums_to(weights: Tensor, total: float) -> Tensor:
    """Scale weights so that their absolute values sum to ``total``."""
    return total * weights / weights.abs().sum().clamp_min(1e-300)


def smallest_norm(gramian: Tensor) -> Tensor:
    """Convex weights of the combination of smallest norm, shape ``(K,)``.

    By non-negative least squares of the combination with one more dimension, in which every
    gradient is 1 and the goal is 1: its solution, scaled to sum to one, is the point. (TorchJD's
    MGDA takes Frank-Wolfe steps, of which a hundred leave several per cent.)

    Args:
        gramian: Positive semi-definite, shape ``(K, K)``.
    """
    values, vectors = np.linalg.eigh(gramian.double().cpu().numpy())
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    ones = np.ones((1, len(root)))
    weights, _ = nnls(np.concatenate([root, ones]), np.append(np.zeros(len(root)), 1.0))
    return torch.from_numpy(weights / weights.sum()).to(gramian)


def fair_weights(gramian: Tensor, alpha: float, iterations: int = 100) -> Tensor:
    """Solve ``gramian @ w = w ** (-1 / alpha)`` for positive w, shape ``(K,)``.

    The equation is that of the minimum of a convex function, ``½ wᵀ G w - Σ φ(w)`` with
    ``φ' = w^(-1/α)``, which Newton's method with a line search finds. (TorchJD 0.18 has Nash-MTL,
    whose solver gives up on badly scaled gradients and returns equal weights, and FairGrad, whose
    least squares take 20 ms for 11 tasks.)

    Args:
        gramian: Positive semi-definite, shape ``(K, K)``, float64, with a positive diagonal.
        alpha: Positive.
        iterations: Largest number of Newton steps.
    """
    matrix, power = gramian.cpu().numpy(), 1 / alpha
    w = np.maximum(matrix.diagonal(), 1e-12) ** (-1 / (1 + power))

    def value(w: Floats) -> float:
        concave = np.log(w) if power == 1 else w ** (1 - power) / (1 - power)
        return float(0.5 * w @ matrix @ w - concave.sum())

    for _ in range(iterations):
        slope = matrix @ w - w**-power
        step = -np.linalg.solve(matrix + np.diag(power * w ** (-power - 1)), slope)
        fall = float(-slope @ step)
        if fall < 1e-18 * max(1.0, abs(value(w))):
            break
        size, start = 1.0, value(w)
        while (w + size * step).min() <= 0 or value(w + size * step) > start - 0.1 * size * fall:
            size /= 2
            if size < 1e-12:  # at the limit of the numbers
                return torch.from_numpy(w)
        w = w + size * step
    return torch.from_numpy(w)

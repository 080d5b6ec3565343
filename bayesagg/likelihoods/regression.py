"""Squared error with a Gaussian likelihood: conjugate posterior (Eq. 2), exact moments (Eq. 4)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesagg.errors import LossError
from bayesagg.heads import Head, RegressionHead
from bayesagg.likelihoods.base import Block
from bayesagg.likelihoods.data import Labels, Observation, Statistics, total_over_labels
from bayesagg.likelihoods.labels import (
    check_shape,
    close,
    factor_of_targets,
    label_mask,
    tolerance,
)
from bayesagg.moments import (
    LogMoments,
    leave_one_out_residuals,
    regression_log_moments,
    regression_moments,
    student_gradient,
)
from bayesagg.posterior import Gaussian, regression_statistics

__all__ = ["RegressionBlock"]


class RegressionBlock(Block):
    """All regression heads; one shared covariance where noise, prior and labels allow it."""

    kind: ClassVar[str] = "regression"

    heads: list[RegressionHead]  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.learns_noise = any(head.noise_variance == "learned" for head in self.heads)
        self.one_noise = len({head.noise_variance for head in self.heads}) == 1
        self._tau2 = torch.ones(self.num_tasks, dtype=self.dtype)  # of the last posterior

    @property
    def extra_sums(self) -> tuple[int, int]:
        """The residual, which is refined, and the level, where noise is learned."""
        return (2, 1) if self.learns_noise else (0, 0)

    def read_labels(self, name: str, head: Head, observed: Observation) -> Labels:
        """``y = z - g / 2f``; the factor ``f`` is half the second derivative, and constant."""
        z, g = observed.output, observed.gradient
        if observed.target is not None:
            return self._given(name, observed)
        assert observed.curvature is not None
        f = observed.curvature / 2
        present = f != 0
        scale = f.amax(0, keepdim=True)
        tol = tolerance(z.dtype)
        deviation = (f - scale).abs() * present
        everywhere = bool(present.all())
        quadratic = (deviation <= tol * scale).all() & (scale >= 0).all()
        if not everywhere:
            quadratic = quadratic & ~(~present & (g != 0)).any()
        value = torch.where(present, g.square() / (4 * f), torch.zeros_like(f)).sum(0)
        quadratic = quadratic & close(observed.per_head(value), observed.loss, tol).all()
        if not bool(quadratic):
            raise LossError(
                f"task {name!r}: the loss is not a squared error of constant weight (its second "
                f"derivative at the head's output varies over the batch or vanishes, or its value "
                f"is another). Labels of another shape than the output, which broadcast, do this, "
                f"and an activation on the output; a classification needs a BinaryHead or "
                f"MulticlassHead. If it is another loss or has per-example weights, pass "
                f"`targets=`. A regulariser added to it needs a backward pass of its own."
            )
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        y = torch.addcdiv(z, g, scale, value=-0.5)
        return Labels(z, y, scale, None if everywhere else present)

    def _given(self, name: str, observed: Observation) -> Labels:
        z = observed.output
        y = check_shape(name, observed.target, z)
        present = label_mask(name, y, torch.isnan(y))
        y = y.nan_to_num(nan=0.0) if present is not None else y
        factor, present = factor_of_targets(
            name, observed.gradient[..., None], (2 * (z - y))[..., None], present
        )
        return Labels(z, y, factor, present)

    def absent(self, name: str, head: Head, rows: int, device: torch.device) -> Labels:
        """All labels missing."""
        zeros = torch.zeros(rows, head.num_tasks, dtype=self.dtype, device=device)
        return Labels(zeros, zeros, torch.ones_like(zeros[:1]), zeros.bool())

    def statistics(self, features: Tensor, labels: Labels) -> Statistics:
        """Gram matrix and ``H̃ᵀy``, for unit noise, so that τ² may change later."""
        precision, shift = regression_statistics(features, labels.targets, labels.present)
        extra = {}
        if self.learns_noise:
            point = (labels.outputs - labels.targets).square()
            level = labels.targets.square()
            extra = {
                "residual": total_over_labels(point, labels),
                "level": total_over_labels(level, labels),
            }
        return Statistics(precision, shift, self.label_count(labels), extra)

    def refine(
        self, features: Tensor, labels: Labels, posterior: Gaussian, batch: Statistics
    ) -> None:
        """Squared residuals for the running mean that is τ².

        Under the paper's rule their expectation under the posterior, ``r² + v``, one step of EM;
        else the squares of the leave-one-out residuals.
        """
        if self.learns_noise and self.rule == "likelihood":
            r = leave_one_out_residuals(features, labels.targets, posterior)
            batch.extra["residual"] = total_over_labels(r.square(), labels)
        elif self.learns_noise:
            r = features @ posterior.mean.mT - labels.targets
            v = (features @ posterior.whitener.mT).square().sum(-1).mT
            batch.extra["residual"] = total_over_labels(r.square() + v, labels)

    def noise_variance(self, device: torch.device, batch: Statistics | None = None) -> Tensor:
        """τ² of every task, ``[K]``; a learned one is at first that of the batch itself."""
        if not self.learns_noise:
            return self.per_task("noise_variance", device)
        learned = torch.ones(self.num_tasks, dtype=self.dtype, device=device)
        if batch is not None:
            learned = torch.where(batch.count > 0, _mean_square(batch), learned)
        learned = self.scale.mean(otherwise=learned)
        for name, head in zip(self.names, self.heads, strict=True):
            if head.noise_variance != "learned":
                learned[self.slices[name]] = float(head.noise_variance)
        return learned

    def natural(
        self, precision: Tensor, shift: Tensor, batch: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        """Divide by τ²; once for all tasks where they share a fixed one.

        Not under ``rule="likelihood"``, whose prior is in units of τ² too, so that it cancels.
        """
        self._tau2 = tau2 = self.noise_variance(shift.device, batch)
        if self.rule == "likelihood":
            return precision, shift
        if self.one_noise and not self.learns_noise:
            noise = float(self.heads[0].noise_variance)
            return (precision, shift) if noise == 1 else (precision / noise, shift / noise)
        return precision / tau2[:, None, None], shift / tau2[:, None]

    def moments(
        self,
        features: Tensor,
        labels: Labels,
        posterior: Gaussian,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> LogMoments:
        """Closed form."""
        if self.rule == "likelihood":
            posterior = posterior.scaled(self._tau2)
        return regression_log_moments(features, labels.targets, posterior, self.d, dtype)

    def covariances(
        self, features: Tensor, labels: Labels, posterior: Gaussian, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Closed form."""
        return regression_moments(features, labels.targets, posterior, self.d, full=True)

    @staticmethod
    def residual(outputs: Tensor, targets: Tensor) -> Tensor:
        """``2 (z - y)``."""
        return 2 * (outputs - targets)

    def likelihood_gradient(
        self, features: Tensor, labels: Labels, posterior: Gaussian | None
    ) -> tuple[Tensor, Tensor | None]:
        """Student-t likelihood, under the posterior without the datum itself."""
        assert posterior is not None
        return student_gradient(features, labels.targets, posterior, self.d, self._tau2)

    def commit(self, batch: Statistics) -> None:
        """Also move the running mean of squared residuals."""
        if self.learns_noise:
            self.scale.update(_mean_square(batch), batch.count > 0)
            batch.extra = {}
        super().commit(batch)

    def module_weights(self, posterior: Gaussian) -> dict[str, Tensor]:
        """Rows of the mean."""
        return {name: posterior.mean[part] for name, part in self.slices.items()}


def _mean_square(batch: Statistics) -> Tensor:
    """Mean squared residual, ``[K]``, kept above rounding of the labels themselves."""
    count = batch.count.clamp(min=1)
    floor = 1e-10 * batch.extra["level"] / count + torch.finfo(count.dtype).tiny
    return torch.maximum(batch.extra["residual"] / count, floor)

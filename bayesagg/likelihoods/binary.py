"""Binary cross-entropy: one Gaussian per output from the GGN (Eq. 8-10)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.errors import LossError, TargetError
from bayesagg.heads import BinaryHead, Head
from bayesagg.likelihoods.classification import ClassificationBlock
from bayesagg.likelihoods.data import Labels, Observation
from bayesagg.likelihoods.labels import (
    check_shape,
    close,
    factor_of_targets,
    label_mask,
    tolerance,
)
from bayesagg.moments import (
    LogMoments,
    binary_log_moments,
    binary_moments,
    monte_carlo_moments,
    sampled_log_moments,
)
from bayesagg.posterior import Gaussian, binary_statistics

__all__ = ["BinaryBlock"]


class BinaryBlock(ClassificationBlock):
    """All binary heads with the same kind of moments."""

    kind: ClassVar[str] = "binary"
    heads: list[BinaryHead]  # type: ignore[assignment]

    def read_labels(self, name: str, head: Head, observed: Observation) -> Labels:
        """``y = σ(z) - g/f``; the second derivative ``f σ(1-σ)`` gives the constant factor."""
        if observed.target is not None:
            return self._given(name, observed)
        assert observed.curvature is not None
        z, g, curvature = observed.output, observed.gradient, observed.curvature
        p = torch.sigmoid(z)
        spread = p * torch.sigmoid(-z)
        tol, eps = tolerance(z.dtype), torch.finfo(z.dtype).eps
        known = blind = None
        if bool((_exact(spread) & (curvature > 0)).all()):  # nothing is saturated or missing
            scale = (curvature.sum(0) / spread.sum(0))[None]
            y = p - g / scale
            valid = (curvature / spread / scale - 1).abs() <= 1.25 * tol
        else:
            scale, y, valid, known, blind = _saturated(observed, p, spread, curvature)
        valid = (valid & (y > -4 * tol) & (y < 1 + 4 * tol)).all()
        snap = max(4 * eps, 4e-3)
        y = y.masked_fill_(y < snap, 0).masked_fill_(y > 1 - snap, 1)
        # A loss with the same derivatives at these outputs has another value.
        each = scale * F.binary_cross_entropy_with_logits(z, y, reduction="none")
        value = observed.per_head((each if known is None else each * known).sum(0))
        agrees = close(value, observed.loss, 8 * tol)
        valid = valid & (agrees if blind is None else agrees | blind).all()
        if not bool(valid):
            raise LossError(
                f"task {name!r}: the loss is not a binary cross-entropy of constant weight, so "
                f"labels cannot be recovered from its derivatives. If it is another loss, or has "
                f"class or example weights, pass `targets=`. A "
                f"regulariser added to it needs a backward pass of its own."
            )
        return Labels(z, y, scale, None if known is None or bool(known.all()) else known)

    def _given(self, name: str, observed: Observation) -> Labels:
        z = observed.output
        y = check_shape(name, observed.target, z)
        present = label_mask(name, y, torch.isnan(y))
        y = y.nan_to_num(nan=0.0) if present is not None else y
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise TargetError(
                f"task {name!r}: binary targets must lie in [0, 1], got "
                f"{float(y.min()):g} to {float(y.max()):g}. Use NaN for a missing label."
            )
        residual = (torch.sigmoid(z) - y)[..., None]
        factor, present = factor_of_targets(name, observed.gradient[..., None], residual, present)
        return Labels(z, y, factor, present)

    def absent(self, name: str, head: Head, rows: int, device: torch.device) -> Labels:
        """All labels missing."""
        zeros = torch.zeros(rows, head.num_tasks, dtype=self.dtype, device=device)
        return Labels(zeros, zeros, torch.ones_like(zeros[:1]), zeros.bool())

    def expansion(self, features: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """One Gaussian per output."""
        return binary_statistics(features, labels.targets, labels.outputs, labels.present)

    def cross_entropy(self, labels: Labels) -> Tensor:
        """Of every output."""
        return F.binary_cross_entropy_with_logits(labels.outputs, labels.targets, reduction="none")

    def moments(
        self,
        features: Tensor,
        labels: Labels,
        posterior: Gaussian,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> LogMoments:
        """Quadrature over the logit, or Eq. 11."""
        if self.heads[0].moments == "monte_carlo":
            sampled = self._sampled(features, labels, posterior, generator, False)
            return sampled_log_moments(*sampled, dtype)
        return binary_log_moments(features, labels.targets, posterior, self.d, dtype)

    def covariances(
        self, features: Tensor, labels: Labels, posterior: Gaussian, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Quadrature over the logit, or Eq. 11."""
        if self.heads[0].moments == "monte_carlo":
            return self._sampled(features, labels, posterior, generator, True)
        return binary_moments(features, labels.targets, posterior, self.d, full=True)

    def _sampled(
        self,
        features: Tensor,
        labels: Labels,
        posterior: Gaussian,
        generator: torch.Generator,
        full: bool,
    ) -> tuple[Tensor, Tensor]:
        samples = self.heads[0].num_samples
        return monte_carlo_moments(
            features, labels.targets, posterior, self.d, samples, generator, full
        )

    @staticmethod
    def residual(outputs: Tensor, targets: Tensor) -> Tensor:
        """``σ(z) - y``."""
        return outputs.sigmoid() - targets

    def point_gradient(self, labels: Labels, device: torch.device) -> Tensor:
        """``(σ(z) - y) w``."""
        residual = torch.sigmoid(labels.outputs) - labels.targets
        return residual[..., None] * self.weights(device)

    def module_weights(self, posterior: Gaussian) -> dict[str, Tensor]:
        """Rows of the mean."""
        return {name: posterior.mean[part] for name, part in self.slices.items()}


def _exact(spread: Tensor) -> Tensor:
    """Where rounding of the curvature, at most eps / σ(1-σ), is below a 16th of the tolerance."""
    return spread > 16 * torch.finfo(spread.dtype).eps / tolerance(spread.dtype)


def _saturated(
    observed: Observation, p: Tensor, spread: Tensor, curvature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Factor and labels of a batch with saturated or missing outputs.

    Returns:
        the factor, ``[1, K]``; labels, ``[N, K]``; whether the derivatives fit them, ``[N, K]``;
        which labels are known, ``[N, K]``; and the heads, ``[H]``, of whose factor nothing is seen.
    """
    z, g = observed.output, observed.gradient
    tol, eps = tolerance(z.dtype), torch.finfo(z.dtype).eps
    zero, negative = torch.zeros_like(z), z < 0
    missing = (g == 0) & (curvature == 0) & (spread > eps)
    known = ~missing
    # The curvature is f σ(1-σ) to eps / (1 - σ); for negative logits it is exact.
    usable = known & (torch.where(negative, spread / eps, spread) > min(tol / 10, 10 * eps))
    hidden = known & ~usable
    right = hidden & (g.abs() <= 2 * curvature)
    scale = _factor(z, g, curvature, spread, usable, hidden & ~right)[None]
    off = torch.where(usable, curvature / spread / scale - 1, zero).abs()
    rounding = tol + 4 * torch.where(negative, zero, eps / spread)
    y = torch.where(right, p.round(), p - g / scale).masked_fill_(missing, 0)
    # Where the factor of a datum cannot be seen, a weight and a soft label are the same.
    hard = torch.minimum(y.abs(), (1 - y).abs()) <= 4 * tol
    valid = (scale > 0) & ((off <= rounding) | ~usable) & (hard | ~hidden)
    blind = observed.per_head((~usable.any(0)).to(z.dtype)) > 0
    return scale, y, valid, known, blind


def _factor(
    z: Tensor, gradient: Tensor, curvature: Tensor, spread: Tensor, usable: Tensor, wrong: Tensor
) -> Tensor:
    """Factor of the loss, ``[K]``, from the best evidence that the batch has.

    The curvature of data that are not saturated, without positive logits that nearly are, whose
    curvature is rounded, if there are others; else of negative saturated logits, whose small
    ``σ(1-σ)`` is exact; else the gradient of saturated data on the wrong side, which is the factor;
    else (all right: there is no gradient) that of a mean.
    """
    exact = (z < 0) & (curvature > 0)
    precise = usable & ((z < 0) | _exact(spread))
    factor = torch.full_like(z[0], 1 / len(z))
    factor = torch.where(wrong.any(0), (gradient.abs() * wrong).amax(0), factor)
    for chosen in (exact, usable, precise):
        ratio = (curvature * chosen).sum(0) / (spread * chosen).sum(0)
        factor = torch.where(chosen.any(0), ratio, factor)
    return factor

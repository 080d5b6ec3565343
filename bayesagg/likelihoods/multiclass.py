"""Cross-entropy over classes: one Gaussian over the contrasts of all class weights (Eq. 8-10)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.errors import HeadError, LossError, TargetError
from bayesagg.heads import Head, MulticlassHead
from bayesagg.likelihoods.classification import ClassificationBlock
from bayesagg.likelihoods.data import Labels, Observation
from bayesagg.likelihoods.labels import close, factor_of_targets, label_mask, tolerance
from bayesagg.moments import (
    LogMoments,
    monte_carlo_moments,
    multiclass_log_moments,
    multiclass_moments,
    sampled_log_moments,
)
from bayesagg.posterior import Gaussian, contrast_basis, multiclass_statistics

__all__ = ["MulticlassBlock"]

_MAX_PARAMETERS = 1 << 14  # a dense covariance of 2 GiB in float64
_TRAINING_NODES = 256  # of the cubature: more exact than Eq. 11 with J = 1024, and cheaper
IGNORE_INDEX = -100


class MulticlassBlock(ClassificationBlock):
    """One or more multi-class heads with the same number of classes and kind of moments."""

    kind: ClassVar[str] = "multiclass"
    needs_curvature: ClassVar[bool] = False
    heads: list[MulticlassHead]  # type: ignore[assignment]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.num_classes = self.heads[0].out_features
        if self.has_posterior and self.weights_per_task > _MAX_PARAMETERS:
            gib = self.weights_per_task**2 * 8 / 2**30
            raise HeadError(
                f"task {self.names[0]!r}: the posterior of {self.num_classes} classes over "
                f"{self.width} weights each is a dense matrix of {gib:.0f} GiB. Reduce the width "
                f"of the shared representation or the number of classes, or use "
                f"rule='likelihood' with s=0 and readout='gradient', which needs no posterior."
            )

    @property
    def weights_per_task(self) -> int:
        """Contrasts times weights."""
        return (self.num_classes - 1) * self.width

    def read_labels(self, name: str, head: Head, observed: Observation) -> Labels:
        """The class where ``g = f (p - y)`` is negative; the factor from the other classes."""
        if observed.target is not None:
            return self._given(name, observed)
        # Classes first: operations along a short last dimension take many times as long.
        z, g = observed.output.mT.contiguous(), observed.gradient.mT.contiguous()
        # But the last bit of half precision counts, and depends on the layout of the loss.
        log_p = F.log_softmax(observed.output, 1).mT if z.dtype.itemsize < 4 else z.log_softmax(0)
        p = F.softmax(observed.output, 1).mT if z.dtype.itemsize < 4 else z.softmax(0)
        silent = (g == 0).all(0)
        certain = (p == 1).any(0)  # saturated to rounding: silent although labelled
        missing = silent & ~certain
        label = torch.where(g.amin(0) < 0, g.argmin(0), z.argmax(0))[None]
        y = torch.zeros_like(z).scatter_(0, label, 1.0)
        others = 1 - y
        wrong = (p * others).sum(0)
        factors = (g * others).sum(0) / wrong.clamp(min=torch.finfo(z.dtype).tiny)
        tol = tolerance(z.dtype)
        informative = ~missing & (wrong > torch.finfo(z.dtype).tiny / torch.finfo(z.dtype).eps)
        total = (wrong * informative).sum()
        scale = (
            (factors * wrong * informative).sum() / total if bool(total > 0) else g.new_tensor(0)
        )
        scale = torch.where(scale != 0, scale, 1 / len(missing))
        deviation = (g - scale * (p - y)).abs() * ~missing
        valid = (scale > 0) & (deviation.amax() <= tol * scale)
        nll = -log_p.gather(0, label)[0] * ~missing
        valid = valid & close(scale * nll.sum(), observed.loss[0], tol)
        if not bool(valid):
            raise LossError(
                f"task {name!r}: the loss is not a cross-entropy of constant weight, so labels "
                f"cannot be recovered from its derivatives. If it is another loss, or has class "
                f"or example weights, pass `targets=`; with label smoothing or soft labels, the "
                f"probabilities that the loss compares with, one per class. A "
                f"regulariser added to it needs a backward pass of its own."
            )
        present = ~missing[:, None] if bool(missing.any()) else None
        return Labels(observed.output[:, None], y.mT[:, None], scale.view(1, 1), present)

    def _given(self, name: str, observed: Observation) -> Labels:
        z, target = observed.output, observed.target
        assert target is not None
        if target.dim() == 2 and target.shape[1] == 1 and not target.is_floating_point():
            target = target[:, 0]
        if target.is_floating_point():
            y, missing = self._probabilities(name, target, z)
        else:
            y, missing = self._classes(name, target, z)
        present = label_mask(name, y, missing)
        residual = (torch.softmax(z, dim=1) - y)[:, None]
        factor, mask = factor_of_targets(
            name,
            observed.gradient[:, None],
            residual,
            None if present is None else present[:, None],
        )
        return Labels(z[:, None], y[:, None], factor, mask)

    def _classes(self, name: str, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if target.shape != z.shape[:1]:
            raise TargetError(
                f"task {name!r}: class targets flatten to {list(target.shape)} for "
                f"{z.shape[0]} data; pass one class index per datum."
            )
        missing = target == IGNORE_INDEX
        if bool((~missing & ((target < 0) | (target >= z.shape[1]))).any()):
            raise TargetError(
                f"task {name!r}: a class index lies outside 0 to {z.shape[1] - 1} (and is not "
                f"the ignore index {IGNORE_INDEX})."
            )
        return F.one_hot(target.clamp(min=0).long(), z.shape[1]).to(z.dtype), missing

    def _probabilities(self, name: str, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if target.shape != z.shape:
            raise TargetError(
                f"task {name!r}: probability targets flatten to {list(target.shape)}, the head's "
                f"output to {list(z.shape)}; class indices must have an integer dtype."
            )
        missing = torch.isnan(target).any(1)
        y = torch.where(missing[:, None], torch.full_like(target, 1 / z.shape[1]), target)
        if not bool((y >= 0).all() & ((y.sum(1) - 1).abs() < 1e-3).all()):
            raise TargetError(f"task {name!r}: probability targets must be >= 0 and sum to one.")
        return y.to(z.dtype), missing

    def absent(self, name: str, head: Head, rows: int, device: torch.device) -> Labels:
        """All labels missing."""
        zeros = torch.zeros(rows, 1, self.num_classes, dtype=self.dtype, device=device)
        none = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        return Labels(zeros, zeros, torch.ones_like(zeros[:1, :, 0]), none)

    def expansion(self, features: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """One Gaussian per task, over all contrasts."""
        parts = [
            multiclass_statistics(
                features,
                labels.targets[:, k],
                labels.outputs[:, k],
                None if labels.present is None else labels.present[:, k],
            )
            for k in range(self.num_tasks)
        ]
        precision = torch.stack([p[0] for p in parts]) if len(parts) > 1 else parts[0][0][None]
        shift = torch.stack([p[1] for p in parts])
        return precision, shift

    def cross_entropy(self, labels: Labels) -> Tensor:
        """Of every task."""
        return -(labels.targets * labels.outputs.log_softmax(2)).sum(2)

    def moments(
        self,
        features: Tensor,
        labels: Labels,
        posterior: Gaussian,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> LogMoments:
        """Cubature over the logit contrasts, or Eq. 11; task by task."""
        parts = []
        for k, single in enumerate(posterior.tasks):
            y = labels.targets[:, k]
            if self.heads[0].moments == "monte_carlo":
                sampled = self._sampled(features, y, single, generator, False)
                parts.append(sampled_log_moments(*sampled, dtype))
            else:
                nodes = _TRAINING_NODES
                parts.append(
                    multiclass_log_moments(
                        features, y, single, self.d, max_nodes=nodes, dtype=dtype
                    )
                )
        return LogMoments(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))

    def covariances(
        self, features: Tensor, labels: Labels, posterior: Gaussian, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Cubature over the logit contrasts, or Eq. 11; task by task."""
        parts = []
        for k, single in enumerate(posterior.tasks):
            y = labels.targets[:, k]
            if self.heads[0].moments == "monte_carlo":
                parts.append(self._sampled(features, y, single, generator, True))
            else:
                nodes = _TRAINING_NODES
                parts.append(multiclass_moments(features, y, single, self.d, True, max_nodes=nodes))
        return torch.stack([p[0] for p in parts], 1), torch.stack([p[1] for p in parts], 1)

    def _sampled(
        self,
        features: Tensor,
        targets: Tensor,
        posterior: Gaussian,
        generator: torch.Generator,
        full: bool,
    ) -> tuple[Tensor, Tensor]:
        samples = self.heads[0].num_samples
        mean, second = monte_carlo_moments(
            features, targets[:, None], posterior, self.d, samples, generator, full
        )
        return mean[:, 0], second[:, 0]

    @staticmethod
    def residual(outputs: Tensor, targets: Tensor) -> Tensor:
        """``p - y``."""
        return outputs.softmax(0) - targets

    def point_gradient(self, labels: Labels, device: torch.device) -> Tensor:
        """``Wᵀ (p - y)``."""
        residual = torch.softmax(labels.outputs, dim=2) - labels.targets
        weights = self.weights(device)
        weights = weights.unflatten(0, (self.num_tasks, self.num_classes))
        return torch.einsum("nkc,kcd->nkd", residual, weights)

    def module_weights(self, posterior: Gaussian) -> dict[str, Tensor]:
        """Contrasts back to classes; the common mode, which no output depends on, is zero."""
        basis = contrast_basis(self.num_classes, posterior.mean)
        mean = posterior.mean.unflatten(1, (-1, self.width))
        return {name: basis.mT @ mean[part.start] for name, part in self.slices.items()}

"""What binary and multi-class heads share: evidence if needed, and a dispersion to learn."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesagg.likelihoods.base import Block
from bayesagg.likelihoods.data import Labels, Statistics, total_over_labels
from bayesagg.posterior import Gaussian

__all__ = ["ClassificationBlock"]

_LEAST = 1e-2  # nats; bounds the weight of a task that is fitted perfectly


class ClassificationBlock(Block):
    """A block of classification heads.

    Under ``rule="likelihood"`` the log-likelihood of a task counts in units of its dispersion
    φ, a running mean of the cross-entropy (docs/theory.md). The posterior is then only computed
    for what uses it: a read-out, or the weights of ``s > 0``.
    """

    decay: ClassVar[float] = 0.99  # a rare class is missing from most batches

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._dispersion = torch.ones(self.num_tasks, dtype=self.dtype)  # of the last step

    @property
    def has_posterior(self) -> bool:
        """Whether evidence on the weights is collected."""
        return (
            self.rule == "paper"
            or self.weighted
            or any(head.readout == "posterior" for head in self.heads)
        )

    @property
    def parameters_per_task(self) -> int:
        """``M``; 0 where there is no posterior."""
        return self.weights_per_task if self.has_posterior else 0

    @property
    def weights_per_task(self) -> int:
        """Weights of a task that its outputs depend on."""
        return self.width

    @property
    def extra_sums(self) -> tuple[int, int]:
        """The deviance, under ``rule="likelihood"``."""
        return int(self.rule == "likelihood"), 0

    @abstractmethod
    def expansion(self, features: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Quadratic expansion of a batch at the current head weights (Eq. 8-10).

        Returns:
            precision, ``[K, M, M]``, and shift, ``[K, M]``.
        """

    @abstractmethod
    def cross_entropy(self, labels: Labels) -> Tensor:
        """Negative log-likelihood in nats of every datum at the head weights, ``[N, K]``."""

    def statistics(self, features: Tensor, labels: Labels) -> Statistics:
        """Quadratic expansion, and the sum of the cross-entropies."""
        if self.has_posterior:
            precision, shift = self.expansion(features, labels)
        else:
            precision = features.new_zeros(self.num_tasks, 0, 0)
            shift = features.new_zeros(self.num_tasks, 0)
        extra = {}
        if self.rule == "likelihood":
            extra = {"deviance": total_over_labels(self.cross_entropy(labels), labels)}
        return Statistics(precision, shift, self.label_count(labels), extra)

    def step_posterior(self, batch: Statistics) -> Gaussian | None:
        """None where the gradient is that of a likelihood and every ``s`` is 0."""
        if self.rule == "paper":
            return self.posterior(batch)
        own = self._mean_deviance(batch)
        self._dispersion = self.scale.mean(otherwise=own).clamp(min=_LEAST)
        return self.posterior(batch) if self.weighted else None

    def commit(self, batch: Statistics) -> None:
        """Also move the running mean that is the dispersion."""
        if self.rule == "likelihood":
            self.scale.update(self._mean_deviance(batch), batch.count > 0)
            batch.extra = {}
        super().commit(batch)

    @staticmethod
    def _mean_deviance(batch: Statistics) -> Tensor:
        """Of the batch, ``[K]``; 1 without a label."""
        seen, count = batch.count > 0, batch.count.clamp(min=1)
        return torch.where(seen, batch.extra["deviance"] / count, torch.ones_like(count))

    def likelihood_gradient(
        self, features: Tensor, labels: Labels, posterior: Gaussian | None
    ) -> tuple[Tensor, Tensor | None]:
        """``Wᵀ(p - y) / φ``: the ordinary gradient in units of the dispersion."""
        ratio = 1 / self._dispersion
        return self.point_gradient(labels, features.device) * ratio[:, None], ratio[None]

    @abstractmethod
    def point_gradient(self, labels: Labels, device: torch.device) -> Tensor:
        """Gradient of the cross-entropy at h, at the current head weights, ``[N, K, d]``."""

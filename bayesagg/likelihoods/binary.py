"""Binary cross-entropy: one Gaussian per output from the GGN (Eq. 8-10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesagg.likelihoods.base import Evidence, Given, Likelihood
from bayesagg.moments import (
    LogMoments,
    binary_log_moments,
    binary_moments,
    monte_carlo_moments,
    sampled_log_moments,
)
from bayesagg.posterior import binary_statistics

if TYPE_CHECKING:
    from bayesagg.reading import Labels

__all__ = ["Binary"]


class Binary(Likelihood):
    """Outputs that are tasks of their own; moments by quadrature over the logit, or Eq. 11."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "s": 0.05,
        "prior_variance": 1.0,
        "readout": "gradient",
        "moments": "quadrature",
        "num_samples": 1024,
    }

    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Quadratic expansion at the current outputs."""
        precision, shift = binary_statistics(features, labels.targets, labels.outputs, weights)
        return Evidence(precision, shift, labels.count())

    def moments(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """Of all outputs at once."""
        if self.samples is None:
            return binary_log_moments(*given[:3], self.d, dtype)
        return sampled_log_moments(*self._sampled(given), dtype)

    def covariances(self, given: Given) -> tuple[Tensor, Tensor]:
        """Of all outputs at once."""
        if self.samples is None:
            return binary_moments(*given[:3], self.d, full=True)
        return self._sampled(given, full=True)

    def _sampled(self, given: Given, full: bool = False) -> tuple[Tensor, Tensor]:
        assert self.samples is not None
        return monte_carlo_moments(*given[:3], self.d, self.samples, given.generator, full=full)

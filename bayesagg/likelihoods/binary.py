"""Binary cross-entropy: one Gaussian per output from the GGN (Eq. 8-10)."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.likelihoods.base import Classification, Evidence, Given
from bayesagg.moments import LogMoments, binary_log_moments, binary_moments
from bayesagg.posterior import binary_statistics
from bayesagg.reading import Labels

__all__ = ["Binary"]


class Binary(Classification):
    """Outputs that are tasks of their own; moments by quadrature over the logit, or Eq. 11."""

    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Quadratic expansion at the current outputs."""
        precision, shift = binary_statistics(features, labels.targets, labels.outputs, weights)
        return Evidence(precision, shift, labels.count())

    def integrals(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """Of all outputs at once."""
        return binary_log_moments(*given[:3], self.d, dtype)

    def full_integrals(self, given: Given) -> tuple[Tensor, Tensor]:
        """Of all outputs at once."""
        return binary_moments(*given[:3], self.d, full=True)

"""Squared error with a Gaussian likelihood: conjugate posterior (Eq. 2), exact moments (Eq. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayesagg.likelihoods.base import Evidence, Given, Likelihood
from bayesagg.moments import LogMoments, regression_log_moments, regression_moments
from bayesagg.posterior import Gaussian, regression_statistics
from bayesagg.reading import Labels

__all__ = ["Regression"]


class Regression(Likelihood):
    """Outputs with independent noise, for which evidence is taken to be of variance one."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "s": 0.8,
        "prior_variance": 1.0,
        "readout": "posterior",
        "noise_variance": 1.0,
    }
    shares: ClassVar[bool] = True

    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Gram matrix, shared where all data count alike, and ``H̃ᵀy``."""
        precision, shift = regression_statistics(features, labels.targets, weights)
        return Evidence(precision, shift, labels.count())

    def squares(
        self, features: Tensor, labels: Labels, weights: Tensor | None, posterior: Gaussian | None
    ) -> Tensor:
        """Squared residuals; under a posterior their expectation ``r² + v``, one step of EM."""
        if posterior is None:
            square = (labels.outputs - labels.targets).square()
        else:
            r = features @ posterior.mean.mT - labels.targets
            v = (features @ posterior.whitener.mT).square().sum(-1).mT
            square = r.square() + v
        both = torch.stack([square, labels.targets.square()])
        return (both if weights is None else both * weights).sum(1)

    def moments(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """Closed form."""
        return regression_log_moments(*given[:3], self.d, dtype)

    def covariances(self, given: Given) -> tuple[Tensor, Tensor]:
        """Closed form."""
        return regression_moments(*given[:3], self.d, full=True)

"""Predictions of regressions: Student-t, or normal, in closed form."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT

from bayesagg.predicting.prediction import Prediction
from bayesagg.predicting.student import NORMAL, student_quantile

__all__ = ["RegressionPrediction"]


class RegressionPrediction(Prediction):
    """Student-t (normal where the noise is given) with location ``h̃ᵀm``, squared scale τ² + h̃ᵀSh̃.

    Calibration multiplies the scale. The variances are those of that distribution: the squared
    scale times ``ν / (ν - 2)``, split in proportion. Units are those of the labels.
    """

    @property
    def mean(self) -> Tensor:
        """``h̃ᵀm``."""
        return self.output

    @cached_property
    def output_variance(self) -> Tensor:
        """``h̃ᵀSh̃`` times the squared calibration, without the factor of a Student-t."""
        return self._back(self._variance * self._scale.square())

    @property
    def epistemic(self) -> Tensor:
        """As of :class:`Prediction`."""
        return self.output_variance * self._inflation

    @property
    def aleatoric(self) -> Tensor:
        """As of :class:`Prediction`; the same for all data."""
        noise = self._per_output(self._noise)
        return noise.expand_as(self.output) * self._inflation

    @property
    def stddev(self) -> Tensor:
        """As of :class:`Prediction`."""
        noise = self._per_output(self._noise)
        return ((self.output_variance + noise) * self._inflation).sqrt()

    @property
    def dof(self) -> Tensor:
        """Degrees of freedom ν of every output, so that they broadcast; infinite: normal."""
        return self._per_output(self._dof)

    @property
    def scale(self) -> Tensor:
        """Scale of the predictive distribution, ``√(τ² + h̃ᵀSh̃)`` times the calibration."""
        return (self.output_variance + self._per_output(self._noise)).sqrt()

    @property
    def distribution(self) -> Distribution:
        """``StudentT``, or ``Normal`` where the noise is given."""
        if bool((self._dof >= NORMAL).all()):
            return Normal(self.output, self.scale, validate_args=False)
        return StudentT(
            self.dof.expand_as(self.output), self.output, self.scale, validate_args=False
        )

    def covariance(self) -> Tensor:
        """Epistemic covariance of every output between the data of the batch, ``[o, N, N]``."""
        factor = self._scale.square() * self._dof_factor
        return self.posterior.covariance(self._h) * factor[:, None, None]

    def sample(
        self,
        number: int = 1,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As of :class:`Prediction`; with a learned noise, one draw of its scale an output too."""
        spread = self._scale * self._mixture(number, generator)[:, None]  # [n, 1, o]
        drawn = self.posterior.draw(number, self._h, generator)
        values = self._location + (drawn - self._location) * spread
        if noise:
            error = torch.randn(
                values.shape, generator=generator, dtype=values.dtype, device=values.device
            )
            values = values + error * spread * self.posterior.noise.to(values.dtype).sqrt()
        return self._back(values, 1)

    def _mixture(self, number: int, generator: torch.Generator | None) -> Tensor:
        """``√(ν / χ²_ν)``, ``[n, o]``: what makes a Student-t of a normal."""
        dof = self._dof.clamp_max(NORMAL).expand(number, -1)
        gamma = torch._standard_gamma(dof / 2, generator=generator)
        return torch.where(self._dof < NORMAL, (dof / 2 / gamma).sqrt(), 1.0)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        half = self._per_output(student_quantile((1 + level) / 2, self._dof)) * self.scale
        return self.output - half, self.output + half

    @property
    def _dof(self) -> Tensor:
        return self.posterior.dof.to(self._h.dtype)

    @property
    def _dof_factor(self) -> Tensor:
        return torch.where(self._dof < NORMAL, self._dof / (self._dof - 2), 1.0)

    @property
    def _inflation(self) -> Tensor:
        return self._per_output(self._dof_factor)

    @property
    def _noise(self) -> Tensor:
        return self.posterior.noise.to(self._h.dtype) * self._scale.square()

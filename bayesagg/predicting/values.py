"""Predictions of regressions: Student-t, or normal, in closed form."""

from __future__ import annotations

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
    def dof(self) -> Tensor:
        """Degrees of freedom ν of every output, so that they broadcast; infinite: normal."""
        return self._per_output(self._dof)

    @property
    def scale(self) -> Tensor:
        """Scale of the predictive distribution, ``√(τ² + h̃ᵀSh̃)`` times the calibration."""
        return self._back((self._variance + self._noise).sqrt())

    @property
    def distribution(self) -> Distribution:
        """As of :class:`Prediction`."""
        if bool((self._dof >= NORMAL).all()):
            return Normal(self.mean, self.scale, validate_args=False)
        return StudentT(self.dof.expand_as(self.mean), self.mean, self.scale, validate_args=False)

    @property
    def _location(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("location", self._place)

    _mean = _location

    @property
    def _variance(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("variance", self._place) * self._scale.square()

    @property
    def _epistemic(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("variance", self._place) * self._factor

    @property
    def _aleatoric(self) -> Tensor:  # type: ignore[override]
        return (self.posterior.noise * self._factor).expand_as(self._location)

    @property
    def _stddev(self) -> Tensor:  # type: ignore[override]
        return self._reading.part("stddev", self._place)

    @property
    def _dof(self) -> Tensor:
        return self.posterior.dof.to(self.rows.dtype)

    @property
    def _factor(self) -> Tensor:  # type: ignore[override]
        return self._scale.square() / (1 - 2 / self._dof)

    @property
    def _noise(self) -> Tensor:
        return self.posterior.noise.to(self.rows.dtype) * self._scale.square()

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        scale = (self._variance + self._noise).sqrt()
        half = student_quantile((1 + level) / 2, self._dof) * scale
        return self._location - half, self._location + half

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        # √(ν / χ²_ν) makes a Student-t of a normal.
        dof = self._dof.clamp_max(NORMAL).expand(number, -1)
        gamma = torch._standard_gamma(dof / 2, generator=generator)
        mixture = torch.where(self._dof < NORMAL, (dof / 2 / gamma).sqrt(), 1.0)
        spread = (self._scale * mixture)[:, None]  # [n, 1, o]
        drawn = self.posterior.draw(number, self.rows, generator)
        values = self._location + (drawn - self._location) * spread
        if noise:
            error = torch.randn(
                values.shape, generator=generator, dtype=values.dtype, device=values.device
            )
            values = values + error * spread * self.posterior.noise.to(values.dtype).sqrt()
        return self._back(values, 1)

"""Settings of the default rule; what they mean is said where they are documented, in the rule."""

from __future__ import annotations

from dataclasses import dataclass

from bayesagg.heads import Head
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.predicting.regression import Prior

__all__ = ["Settings"]

_VARIANCE, _WEIGHTS = 0.05, 65  # of the prior, and up to how wide; measured: docs/default.md
_RECENT = 100  # steps that noise and lengths go back
_LONG, _SHARE = 200, 2  # steps that the scales go back, later a part of all; docs/default.md
_SMALL = 0.1  # mean square of features below which γ is in units of it
_PER_WEIGHT = 20  # data that the memory holds, and that the prior of a regression is made for


@dataclass(frozen=True)
class Settings:
    """Of :class:`bayesagg.rules.LikelihoodRule`, which has their documentation.

    Raises:
        ValueError: for a setting out of range.
    """

    memory: int | None = None
    warmup: int = 50
    lag: int | None = None
    prior_variance: float | None = None
    degrees_of_freedom: float = 10.0
    keep_length: bool = True

    def __post_init__(self) -> None:
        for setting, least in (("memory", 1), ("warmup", 0), ("lag", 1)):
            value = getattr(self, setting)
            given = value is not None or setting == "warmup"
            if given and (type(value) is not int or value < least):
                raise ValueError(f"{setting} must be an integer >= {least}, got {value!r}.")
        for setting in ("prior_variance", "degrees_of_freedom"):
            value = getattr(self, setting)
            given = value is not None or setting != "prior_variance"
            if given and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{setting} must be a positive number, got {value!r}.")

    def memory_of(self, width: int) -> float:
        """N for outputs of ``width`` weights."""
        return float(self.memory or _PER_WEIGHT * width)

    def prior_of(self, head: Head) -> Prior:
        """Of the weights of a head, for predictions."""
        least = 0.0 if self.given_of(head) else float(_PER_WEIGHT)
        small = self.small_of(head)
        return Prior(self.variance_of(head), relative=True, per_weight=least, small=small)

    def given_of(self, head: Head) -> float | None:
        """γ of a head, where somebody has set it."""
        return head.prior_variance or self.prior_variance

    def variance_of(self, head: Head) -> float:
        """γ of a head: by default one that expects no larger outputs of wider features."""
        width = head.in_features + head.has_bias
        variance = _VARIANCE * BOUNDS[head.kind].prior_factor(head.out_features)
        return self.given_of(head) or variance * min(1.0, _WEIGHTS / width)

    def small_of(self, head: Head) -> float:
        """Mean square of features below which γ is in units of it; 0 where somebody has set γ."""
        return 0.0 if self.given_of(head) else _SMALL

    def decays_of(self, steps: int) -> tuple[float, float]:
        """``1 - 1/L``, weights of the past in the running means of step ``t = steps + 1``.

        ``L = 100`` for noise and lengths, ``max(200, t/2)`` for the scales that tasks are weighed
        by; both are ``lag`` if that is set.
        """
        lags = self.lag or _RECENT, self.lag or max(_LONG, (steps + 1) / _SHARE)
        return 1 - 1 / lags[0], 1 - 1 / lags[1]

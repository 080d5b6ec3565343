"""Errors and warnings; every message names the task concerned and the remedy."""

from __future__ import annotations

__all__ = [
    "BayesAggError",
    "CaptureError",
    "CheckpointError",
    "FeatureError",
    "HeadError",
    "LossError",
    "NumericalError",
    "NumericalWarning",
    "PredictionError",
    "RankError",
    "TargetError",
    "UnknownTaskError",
]


class BayesAggError(Exception):
    """Base class of all errors that the library raises on purpose."""


class HeadError(BayesAggError, ValueError):
    """A head is not linear, was changed, shares weights, or has settings that do not suit it."""


class CaptureError(BayesAggError, RuntimeError):
    """No usable forward pass: none was seen, or the heads did not receive the shared tensor."""


class UnknownTaskError(BayesAggError, KeyError):
    """A loss or target is given for a task that has no head."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class LossError(BayesAggError, ValueError):
    """A loss is not finite, not differentiable, or not of the kind its head expects."""


class TargetError(BayesAggError, ValueError):
    """Targets have the wrong shape, are not valid labels, or do not belong to the loss."""


class FeatureError(BayesAggError, ValueError):
    """What a head received is empty, not finite or was changed in place, or its output was."""


class CheckpointError(BayesAggError, ValueError):
    """A state is damaged, or was saved from something else than what is to load it."""


class NumericalError(BayesAggError, ArithmeticError):
    """A posterior precision could not be factorized, or its posterior is beyond all numbers."""


class PredictionError(BayesAggError, RuntimeError):
    """There is nothing to predict with: no evidence of a head, or a predictor without a state."""


class RankError(BayesAggError, RuntimeError):
    """Another data-parallel rank refused its batch, so this rank cannot take the step either."""


class NumericalWarning(UserWarning):
    """Numbers to look at, such as jitter in a matrix, a mode not reached, an unlikely prior."""

"""Predictive distributions of every task, by the posteriors of the last layers.

``optimizer.predictor(model)`` makes a :class:`Predictor`; called on inputs, it gives a
:class:`Prediction` for each task.
"""

from bayesagg.predicting.kinds import BinaryPrediction, MulticlassPrediction, RegressionPrediction
from bayesagg.predicting.prediction import Prediction
from bayesagg.predicting.predictor import MeanAndStddev, Predictor

__all__ = [
    "BinaryPrediction",
    "MeanAndStddev",
    "MulticlassPrediction",
    "Prediction",
    "Predictor",
    "RegressionPrediction",
]

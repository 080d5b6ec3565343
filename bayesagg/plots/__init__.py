"""Pictures of the method at work; needs matplotlib (``pip install 'bayesagg[plots]'``).

Every function takes tensors or arrays, draws into ``ax`` (or a new figure) and returns the Axes.
Colours are those of Okabe and Ito, or cividis: told apart with any colour vision.
"""

from bayesagg.plots.calibration import plot_calibration, plot_reliability
from bayesagg.plots.predictions import plot_coverage, plot_predictions
from bayesagg.plots.tasks import plot_certainty, plot_conflict, plot_task_weights
from bayesagg.plots.update import plot_update
from bayesagg.plots.weights import plot_weights

__all__ = [
    "plot_calibration",
    "plot_certainty",
    "plot_conflict",
    "plot_coverage",
    "plot_predictions",
    "plot_reliability",
    "plot_task_weights",
    "plot_update",
    "plot_weights",
]

"""Pictures of the method at work; needs matplotlib (``pip install 'bayesagg[plots]'``).

Every function takes tensors or arrays, draws into ``ax`` (or a new figure) and returns the Axes;
without matplotlib it raises ``ImportError``.
Colours are those of Okabe and Ito, or cividis: told apart with any colour vision.
"""

from bayesagg.plots.calibration import (
    plot_calibration,
    plot_coverage,
    plot_predictions,
    plot_reliability,
)
from bayesagg.plots.tasks import plot_certainty, plot_conflict, plot_task_weights, plot_weights
from bayesagg.plots.update import plot_update

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

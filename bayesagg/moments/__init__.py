"""First two moments of the per-datum gradient at the shared representation, one file a likelihood.

Each function takes a Gaussian posterior over head weights and returns, for a loss of factor one,
``E[g]`` and ``Var[g]`` (diagonal) or ``Cov[g]`` (full) of ``g = ∂ℓ/∂h`` per datum and task.
"""

from bayesagg.moments.binary import binary_log_moments, binary_moments
from bayesagg.moments.common import LogMoments
from bayesagg.moments.monte_carlo import monte_carlo_moments, sampled_log_moments
from bayesagg.moments.multiclass import multiclass_log_moments, multiclass_moments
from bayesagg.moments.nodes import gaussian_nodes
from bayesagg.moments.regression import regression_log_moments, regression_moments
from bayesagg.moments.student import LeaveOneOut, Spectrum, leave_one_out, student_gradient

__all__ = [
    "LeaveOneOut",
    "LogMoments",
    "Spectrum",
    "binary_log_moments",
    "binary_moments",
    "gaussian_nodes",
    "leave_one_out",
    "monte_carlo_moments",
    "multiclass_log_moments",
    "multiclass_moments",
    "regression_log_moments",
    "regression_moments",
    "sampled_log_moments",
    "student_gradient",
]

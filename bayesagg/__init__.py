"""Train multi-task networks by how certain each task is of its gradient.

See https://arxiv.org/abs/2402.04005 for the method (BayesAgg-MTL, ICML 2024).
"""

from bayesagg.engine import BayesAgg
from bayesagg.heads import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.optimizer import BayesAggWrapper

__all__ = ["BayesAgg", "BayesAggWrapper", "BinaryHead", "MulticlassHead", "RegressionHead"]
__version__ = "0.1.0"

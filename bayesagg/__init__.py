"""Train multi-task networks better than by adding the losses up.

See https://arxiv.org/abs/2402.04005 for the paper (BayesAgg-MTL, ICML 2024), and docs/theory.md for
the default rule.
"""

from bayesagg.engine import BayesAgg
from bayesagg.heads import BinaryHead, LossTask, MulticlassHead, RegressionHead
from bayesagg.optimizer import BayesAggWrapper
from bayesagg.rules import LikelihoodRule, PaperRule

__all__ = [
    "BayesAgg",
    "BayesAggWrapper",
    "BinaryHead",
    "LikelihoodRule",
    "LossTask",
    "MulticlassHead",
    "PaperRule",
    "RegressionHead",
]
__version__ = "0.1.0"

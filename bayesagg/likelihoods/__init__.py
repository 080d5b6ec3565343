"""Likelihoods by kind of head: what rules take of them, without any state.

A new likelihood is a subclass of :class:`Likelihood` and a line here, for the paper's rule, and a
:class:`bayesagg.likelihoods.bounds.Bound` for the default one.
"""

from bayesagg.likelihoods.base import Evidence, Given, Likelihood
from bayesagg.likelihoods.binary import Binary
from bayesagg.likelihoods.multiclass import Multiclass
from bayesagg.likelihoods.regression import Regression

__all__ = ["LIKELIHOODS", "Evidence", "Given", "Likelihood"]

LIKELIHOODS: dict[str, type[Likelihood]] = {
    "regression": Regression,
    "binary": Binary,
    "multiclass": Multiclass,
}
"""By kind of head."""

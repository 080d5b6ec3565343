"""Cross-entropy over classes: one Gaussian over the contrasts of all class weights (Eq. 8-10)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from bayesagg.errors import NumericalWarning
from bayesagg.heads import Head
from bayesagg.likelihoods.base import Classification, Evidence, Given, Likelihood
from bayesagg.likelihoods.bounded import BoundedMulticlass
from bayesagg.moments import LogMoments, multiclass_log_moments, multiclass_moments
from bayesagg.posterior import contrast_basis, multiclass_statistics
from bayesagg.reading import Labels

__all__ = ["Multiclass"]

_NODES = 256  # of the cubature: more exact than Eq. 11 with J = 1024, and cheaper
# Beyond, a step of 128 data takes more than about half a second on two cores.
_MAX_CLASSES, _MAX_PARAMETERS = 16, 2560


class Multiclass(Classification):
    """Tasks of equally many classes, whose moments are taken one by one."""

    @classmethod
    def of(cls, name: str, head: Head, samples: int | None) -> Likelihood:
        """With a curvature that is bounded where its matrix would be too large.

        Warns:
            NumericalWarning: if it is.
        """
        exact = super().of(name, head, samples)
        if exact.classes <= _MAX_CLASSES and exact.parameters <= _MAX_PARAMETERS:
            return exact
        warnings.warn(
            f"task {name!r}: the curvature of Eq. 8-10 for {exact.classes} classes of "
            f"{exact.width} weights is a matrix of {exact.parameters} rows, with which a step "
            f"takes half a second or far more. Böhning's bound of it, one matrix of {exact.width} "
            f"rows for all classes, is used instead. Up to {_MAX_CLASSES} classes and "
            f"{_MAX_PARAMETERS} rows are computed as in the paper.",
            NumericalWarning,
            stacklevel=6,
        )
        return BoundedMulticlass(exact.d, exact.bias, exact.classes, exact.samples)

    @property
    def parameters(self) -> int:
        """Contrasts times weights."""
        return (self.classes - 1) * self.width

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Probabilities."""
        return (self.classes,)

    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Quadratic expansion at the current outputs, task by task."""
        parts = [
            multiclass_statistics(
                features,
                labels.targets[:, k],
                labels.outputs[:, k],
                None if weights is None else weights[:, k],
            )
            for k in range(labels.targets.shape[1])
        ]
        precision, shift = (torch.stack(part) for part in zip(*parts, strict=True))
        return Evidence(precision, shift, labels.count())

    def integrals(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """Cubature over the logit contrasts."""
        parts = [
            multiclass_log_moments(h, y[:, 0], posterior, self.d, max_nodes=_NODES, dtype=dtype)
            for h, y, posterior, _ in _tasks(given)
        ]
        return LogMoments(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))

    def full_integrals(self, given: Given) -> tuple[Tensor, Tensor]:
        """Cubature over the logit contrasts."""
        parts = [
            multiclass_moments(h, y[:, 0], posterior, self.d, True, max_nodes=_NODES)
            for h, y, posterior, _ in _tasks(given)
        ]
        mean, second = (torch.stack(part, 1) for part in zip(*parts, strict=True))
        return mean, second

    def sampled(self, given: Given, full: bool) -> tuple[Tensor, Tensor]:
        """One task after the other."""
        parts = [super(Multiclass, self).sampled(one, full) for one in _tasks(given)]
        mean, second = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return mean, second

    def module_weights(self, mean: Tensor) -> Tensor:
        """Contrasts back to classes; the common mode, which no output depends on, is zero."""
        basis = contrast_basis(self.classes, mean)
        return torch.matmul(basis.mT, mean.unflatten(1, (-1, self.width))).flatten(0, 1)


def _tasks(given: Given) -> Iterator[Given]:
    """One after the other, with targets ``[N, 1, C]``."""
    for k, posterior in enumerate(given.posterior.tasks):
        yield given._replace(targets=given.targets[:, k : k + 1], posterior=posterior)

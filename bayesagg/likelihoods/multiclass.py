"""Cross-entropy over classes: one Gaussian over the contrasts of all class weights (Eq. 8-10)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from bayesagg.errors import NumericalWarning
from bayesagg.heads import Head
from bayesagg.likelihoods.base import Classification, Evidence, Given, Likelihood
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.moments import LogMoments, multiclass_log_moments, multiclass_moments
from bayesagg.moments.common import whitened
from bayesagg.moments.nodes import sobol_nodes
from bayesagg.posterior import contrast_basis, multiclass_statistics, regression_statistics
from bayesagg.reading import Labels

__all__ = ["BoundedMulticlass", "Multiclass"]

_NODES = 256  # of the cubature: more exact than Eq. 11 with J = 1024, and cheaper
_CHUNK = 1 << 21  # elements of the largest intermediate
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


class BoundedMulticlass(Likelihood):
    """One task of many classes, each a Gaussian of its own with the covariance of all.

    ``diag p - p pᵀ ≤ 1/2`` (Böhning 1992), so that ``Λ = ½ H̃ᵀH̃`` for each class, and the classes
    are independent a posteriori. The posterior mean cannot overshoot; the variances are smaller
    than those of Eq. 8-10, most of all for classes that are rarely likely.

    Moments of ``g = Wᵀρ``, ``ρ = p(z) - y``: the logits are ``z = m_z + √v ε`` with one ``v``, and
    given ε every column of ``W`` is normal with mean ``m_d + ρ̃_d ε``, ``ρ̃ = S h̃/√v``, and variance
    ``S_dd - ρ̃_d²``. So with ``a = Wᵀρ`` at that mean::

        E[g] = E[a],    Var[g] = Var[a] + E[ρᵀρ] (S_dd - ρ̃²)
    """

    defaults = Classification.defaults

    @property
    def rows(self) -> int:
        """A Gaussian a class."""
        return self.classes

    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Least squares on the working responses of the bound."""
        curvature = BOUNDS["multiclass"].curvature
        error = labels.outputs.softmax(2) - labels.targets
        working = (labels.outputs - error / curvature).flatten(1)
        if weights is None:
            precision, shift = regression_statistics(features, working)
        else:
            one = weights[:, :1].to(features.dtype)
            precision = (features * one).mT @ features[None]
            shift = (working * one).mT @ features
        return Evidence(precision * curvature, shift * curvature, labels.count())

    def moments(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """Sobol points for ε, or normal ones for Eq. 11."""
        parts = []
        for along, level, rest, _ in self._parts(given, dtype):
            mean = along.mean(1)
            relative = (along - mean[:, None]).square_().mean(1).div_(level).add_(rest)
            relative = relative.clamp_(min=torch.finfo(dtype).tiny)
            parts.append((mean[:, None], relative[:, None], level.log()[:, None]))
        return LogMoments(*map(torch.cat, zip(*parts, strict=True)))

    def covariances(self, given: Given) -> tuple[Tensor, Tensor]:
        """As :meth:`moments`."""
        parts, s = [], given.posterior.covariance[0, : self.d, : self.d]
        for along, level, _, rho in self._parts(given, given.features.dtype):
            mean = along.mean(1)
            centred = along - mean[:, None]
            covariance = centred.mT @ centred / along.shape[1]
            covariance += level[..., None] * (s - rho[:, :, None] * rho[:, None])
            parts.append((mean[:, None], covariance[:, None]))
        mean, second = map(torch.cat, zip(*parts, strict=True))
        return mean, second

    def _parts(
        self, given: Given, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of some data at a time: a, ``[n, J, d]``, ``E[ρᵀρ]``, ``S_dd - ρ̃²`` and ρ̃, ``[n, d]``."""
        features, targets, posterior, generator = given
        if self.samples is None:
            nodes = sobol_nodes(self.classes, _NODES, dtype, features.device)
        else:
            shape = (self.classes, self.samples)
            nodes = torch.randn(shape, generator=generator, dtype=dtype, device=features.device)
        mean = posterior.mean[:, : self.d].to(dtype)
        each = nodes.shape[1] * max(self.classes, self.d)
        size = max(1, _CHUNK // each)
        for h, y in zip(features.split(size), targets[:, 0].split(size), strict=True):
            sd, rho, variance = (x[0] for x in whitened(h, posterior, self.d, dtype))
            z = (h @ posterior.mean.mT).to(dtype)[..., None] + sd.to(dtype)[..., None] * nodes
            error = z.softmax(1).sub_(y.to(dtype)[..., None])
            # They add up to zero: that of the label, close to -0 or far more, from the others.
            label = y.argmax(1)[:, None, None].expand(-1, 1, error.shape[2])
            error = error.scatter_(1, label, 0.0)
            error = error.scatter_(1, label, -error.sum(1, keepdim=True))
            slope = (error * nodes).sum(1)
            along = slope[..., None] * rho[:, None]
            along = along.baddbmm_(error.mT, mean.expand(len(h), -1, -1))
            level = error.square_().sum(1).mean(1, keepdim=True)
            yield along, level.clamp_(min=torch.finfo(dtype).tiny), variance - rho.square(), rho

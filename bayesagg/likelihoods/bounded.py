"""Cross-entropy over many classes: the curvature by its bound, one matrix for all classes.

``diag p - p pᵀ ≤ 1/2`` (Böhning 1992), so that ``Λ = ½ H̃ᵀH̃`` for each class, and the classes are
independent a posteriori. The posterior mean cannot overshoot; the variances are smaller than those
of Eq. 8-10, most of all for classes that are rarely likely.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bayesagg.likelihoods.base import Classification, Evidence, Given, Likelihood
from bayesagg.likelihoods.bounds import BOUNDS
from bayesagg.moments import LogMoments
from bayesagg.moments.common import whitened
from bayesagg.moments.nodes import sobol_nodes
from bayesagg.posterior import regression_statistics
from bayesagg.reading import Labels

__all__ = ["BoundedMulticlass"]

_NODES = 256
_CHUNK = 1 << 21  # elements of the largest intermediate


class BoundedMulticlass(Likelihood):
    """One task of many classes, each a Gaussian of its own with the covariance of all.

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

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Probabilities."""
        return (self.classes,)

    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Least squares on the working responses of the bound."""
        bound = BOUNDS["multiclass"]
        error = labels.outputs.softmax(2) - labels.targets
        working = bound.working(labels, error * labels.factor[..., None])
        if weights is None:
            precision, shift = regression_statistics(features, working)
        else:
            one = weights[:, :1].to(features.dtype)
            precision = (features * one).mT @ features[None]
            shift = (working * one).mT @ features
        return Evidence(precision * bound.curvature, shift * bound.curvature, labels.count())

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

"""What the paper's equations take of a likelihood, as functions without any state.

A new likelihood is one subclass of :class:`Likelihood` and one line in
:mod:`bayesagg.likelihoods`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bayesagg.heads import Head
from bayesagg.moments import LogMoments, monte_carlo_moments, sampled_log_moments
from bayesagg.posterior import Gaussian
from bayesagg.reading import Labels

__all__ = ["Evidence", "Given", "Likelihood"]


@dataclass(frozen=True)
class Evidence:
    """Natural parameters of a batch or of more, and how many labels they are from; additive.

    ``R`` Gaussians of ``M`` weights belong to ``K`` tasks: ``R`` is ``K``, or ``K`` is 1.

    Attributes:
        precision: ``Λ``, ``[G, M, M]``; ``G`` is ``K``, or 1 where all tasks share it.
        shift: ``η = Λ · mean``, ``[R, M]``.
        count: labels, ``[K]``.
    """

    precision: Tensor
    shift: Tensor
    count: Tensor

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.precision + other.precision, self.shift + other.shift, self.count + other.count
        )

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What ranks send each other: of the precision its lower triangle."""
        row, column = _triangle(self.precision)
        return self.precision[:, row, column], self.shift, self.count

    def unpacked(self, triangle: Tensor, shift: Tensor, count: Tensor) -> Evidence:
        """Inverse of :meth:`packed`, for numbers of this one's shapes."""
        row, column = _triangle(self.precision)
        precision = torch.empty_like(self.precision, memory_format=torch.contiguous_format)
        precision[:, row, column] = triangle
        precision[:, column, row] = triangle
        return Evidence(precision, shift, count)

    def scaled(self, factor: Tensor | float, shared: bool = False) -> Evidence:
        """All of it times a number, or times one for each task, ``[K]``.

        ``shared``: those are all the same, so that a shared precision stays shared.
        """
        if not isinstance(factor, Tensor):
            return Evidence(self.precision * factor, self.shift * factor, self.count * factor)
        of_precision = (factor[:1] if shared else factor)[:, None, None]
        return Evidence(
            self.precision * of_precision, self.shift * factor[:, None], self.count * factor
        )


def _triangle(precision: Tensor) -> Tensor:
    m = precision.shape[-1]
    return torch.tril_indices(m, m, device=precision.device)


class Given(NamedTuple):
    """What moments of the gradients are taken of.

    Attributes:
        features: ``h̃``, ``[N, D]``.
        targets: of ``K`` tasks, ``[N, K]`` or ``[N, K, C]``.
        posterior: of their weights.
        generator: of Monte-Carlo samples.
    """

    features: Tensor
    targets: Tensor
    posterior: Gaussian
    generator: torch.Generator


@dataclass(frozen=True)
class Likelihood(ABC):
    """The likelihood of heads of one kind that are computed together.

    Attributes:
        d: dimensions of the features.
        bias: whether the weights include a bias.
        classes: outputs of a task with several, else 1.
        samples: J of Eq. 11; ``None``: by quadrature, or in closed form.
    """

    d: int
    bias: bool
    classes: int = 1
    samples: int | None = None

    defaults: ClassVar[Mapping[str, Any]]  # of the paper's rule, where a head says nothing
    shares: ClassVar[bool] = False  # tasks have one precision where all data count alike

    @classmethod
    def of(cls, name: str, head: Head, samples: int | None) -> Likelihood:
        """That of a head of this kind, whose name is for warnings."""
        return cls(head.in_features, head.has_bias, head.out_features // head.num_tasks, samples)

    @property
    def width(self) -> int:
        """``D``: dimensions of the features plus one for a bias."""
        return self.d + self.bias

    @property
    def rows(self) -> int:
        """Gaussians for each task, ``R / K``."""
        return 1

    @property
    def parameters(self) -> int:
        """``M``, the dimension of each Gaussian."""
        return self.width

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of the label of one task and datum: a number, or probabilities of its classes."""
        return (self.classes,) if self.classes > 1 else ()

    @abstractmethod
    def evidence(self, features: Tensor, labels: Labels, weights: Tensor | None) -> Evidence:
        """Evidence of a batch for a unit scale of the likelihood.

        Args:
            features: ``h̃``, ``[N, D]``.
            labels: of ``K`` tasks.
            weights: of the data, as of :meth:`bayesagg.reading.Labels.weights`.
        """

    def squares(
        self, features: Tensor, labels: Labels, weights: Tensor | None, posterior: Gaussian | None
    ) -> Tensor:
        """What a learned scale of the likelihood is the mean of, summed over a batch, ``[2, K]``.

        Under a posterior of the weights, or else at the head's own outputs. The second sum is of
        the labels' squares, which bounds the rounding. Other arguments as of :meth:`evidence`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scale to learn.")

    @abstractmethod
    def moments(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """``E[g]`` and the logarithm of ``Var[g]`` for factor one, in ``dtype``."""

    @abstractmethod
    def covariances(self, given: Given) -> tuple[Tensor, Tensor]:
        """``E[g]``, ``[N, K, d]``, and ``Cov[g]``, ``[N, K, d, d]``, for factor one."""

    def module_weights(self, mean: Tensor) -> Tensor:
        """Rows of the heads' modules, bias last, from means ``[R, M]``; ``[outputs, D]``."""
        return mean


class Classification(Likelihood):
    """Moments by quadrature, or by samples (Eq. 11)."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "s": 0.05,
        "prior_variance": 1.0,
        "readout": "gradient",
        "moments": "quadrature",
        "num_samples": 1024,
    }

    def moments(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """As of any likelihood."""
        if self.samples is None:
            return self.integrals(given, dtype)
        return sampled_log_moments(*self.sampled(given, False), dtype)

    def covariances(self, given: Given) -> tuple[Tensor, Tensor]:
        """As of any likelihood."""
        return self.full_integrals(given) if self.samples is None else self.sampled(given, True)

    @abstractmethod
    def integrals(self, given: Given, dtype: torch.dtype) -> LogMoments:
        """:meth:`moments` by quadrature."""

    @abstractmethod
    def full_integrals(self, given: Given) -> tuple[Tensor, Tensor]:
        """:meth:`covariances` by quadrature."""

    def sampled(self, given: Given, full: bool) -> tuple[Tensor, Tensor]:
        """Either by samples, of all outputs at once."""
        assert self.samples is not None
        return monte_carlo_moments(*given[:3], self.d, self.samples, given.generator, full)

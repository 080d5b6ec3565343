"""What is predicted of one task at a batch of inputs, and how sure that is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesagg.predicting.state import HeadPosterior
from bayesagg.reading.hooks import flatten

__all__ = ["CHUNK", "Prediction", "Reading", "by_rows", "in_full_precision"]

CHUNK = 1 << 22  # elements of the largest intermediate; bounds the extra memory of dense heads


def by_rows(
    function: Callable[..., Tensor | tuple[Tensor, ...]], each: int, *rows: Tensor
) -> tuple[Tensor, ...]:
    """A function of rows, some data at a time; ``each``: elements that it has of a datum."""
    size = max(1, CHUNK // max(each, 1))
    # A traced graph has no loop whose length depends on the batch.
    whole = torch.compiler.is_compiling() or len(rows[0]) <= size
    parts = [rows] if whole else zip(*(r.split(size) for r in rows), strict=True)
    found = [function(*part) for part in parts]
    pieces = [(one,) if isinstance(one, Tensor) else one for one in found]
    return tuple(p[0] if whole else torch.cat(p) for p in zip(*pieces, strict=True))


def in_full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would take most digits of products."""
    under = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if under else nullcontext()


class Reading:
    """What heads of one kind on one tensor predict, for all together, when one of them asks.

    Each kind has the members ``mean``, ``epistemic``, ``aleatoric``, ``stddev``, ``output`` and
    ``output_variance`` of :class:`Prediction`, all ``[N, o]``, and ``factor``, ``[o]``: from
    ``h̃ᵀSh̃`` to the epistemic variance, or that of the logits.

    Args:
        features: what they received.
        posteriors: of one head, or of several; those on one set of eigenvectors take less time.
    """

    def __init__(self, features: Tensor, posteriors: Sequence[HeadPosterior]) -> None:
        self.posteriors, first = posteriors, posteriors[0].head.channels_first
        shape = features.shape
        self.shape = (shape[0], *shape[2:]) if first else shape[:-1]
        self.h = posteriors[0].augmented(flatten(features, first))
        self._parts: dict[str, tuple[Tensor, ...]] = {}

    def of_all(self, name: str, dimension: int = 0) -> Tensor:
        """A buffer of all of them, along their outputs."""
        parts = [posterior._buffers[name] for posterior in self.posteriors]  # faster than getattr
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dimension)  # type: ignore[arg-type]
        return whole.to(self.h.dtype)  # type: ignore[union-attr]

    def part(self, name: str, place: int) -> Tensor:
        """What one of the heads has of a member."""
        if name not in self._parts:
            with in_full_precision(self.h.device):
                whole: Tensor = getattr(self, name)
            widths = [posterior.head.out_features for posterior in self.posteriors]
            self._parts[name] = (whole,) if len(widths) == 1 else whole.split(widths, -1)
        return self._parts[name][place]

    @cached_property
    def location(self) -> Tensor:
        """Mean of all outputs, ``[N, o]``."""
        return self.h @ self.of_all("mean").mT

    @cached_property
    def variance(self) -> Tensor:
        """Variance of all outputs, ``[N, o]``."""
        first = self.posteriors[0]
        if not first.shared or len({id(p._buffers["vectors"]) for p in self.posteriors}) > 1:
            parts = [by_rows(p.variance, p.per_row(), self.h)[0] for p in self.posteriors]
            return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        square = (self.h @ first.vectors[0].to(self.h.dtype)).square()
        return square @ self.of_all("variances", 1)[0].mT


class Prediction:
    """Predictive distribution of a task's labels at the data that its head received.

    Tensors have the shape of the head's output: ``[..., o]``, or ``[B, o, ...]`` of a convolution.
    They are computed when they are first asked for.

    Args:
        reading: of what the head's last linear layer received.
        place: of the posterior among those of the reading.
    """

    reading: ClassVar[type[Reading]]

    def __init__(self, reading: Reading, place: int) -> None:
        self.posterior, self._reading, self._place = reading.posteriors[place], reading, place

    def __repr__(self) -> str:
        """Kind and shape."""
        return f"{type(self).__name__}(shape={tuple(self.mean.shape)})"

    @property
    def rows(self) -> Tensor:
        """``h̃`` of every datum (position), ``[N, D]``."""
        return self._reading.h

    @property
    def mean(self) -> Tensor:
        """Expected label: a value, or probabilities."""
        return self._back(self._rows("mean"))

    @property
    def epistemic(self) -> Tensor:
        """Variance that more data would remove: that of the value, or of the probabilities."""
        return self._back(self._rows("epistemic"))

    @property
    def aleatoric(self) -> Tensor:
        """Variance of the label that is left if the weights were known, on average."""
        return self._back(self._rows("aleatoric"))

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of the label: ``√(epistemic + aleatoric)``."""
        return self._back(self._rows("stddev"))

    @property
    def distribution(self) -> Distribution:
        """Of the label, from ``torch.distributions``.

        ``StudentT``, or ``Normal`` where the noise is given; ``Bernoulli`` of binary outputs;
        ``Categorical`` over classes, for every datum (position).
        """
        raise NotImplementedError

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval of the label's value, or of the probabilities.

        Args:
            level: its probability, between 0 and 1.

        Returns:
            lower and upper ends.

        Raises:
            ValueError: for a level out of range.
        """
        try:
            level = float(level)
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several
            level = math.nan
        if not 0 < level < 1:
            raise ValueError("level must be one number between 0 and 1, such as 0.9 for 90 %.")
        with in_full_precision(self.rows.device):
            low, high = self._interval(level)
        return self._back(low), self._back(high)

    def sample(
        self,
        number: int = 1,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws of the values (probabilities), jointly for the batch: one set of weights a draw.

        Of a regression with a learned noise, one draw of its scale an output too.

        Args:
            number: of draws, ``n``.
            noise: draw labels (class indices without the dimension of classes) instead.
            generator: of the random numbers.

        Returns:
            ``n`` in front of the shape of the head's output.

        Raises:
            TypeError: for a number that is no integer.
            ValueError: for a negative one.
        """
        if operator.index(number) < 0:
            raise ValueError(f"the number of draws must not be negative, got {number!r}.")
        with in_full_precision(self.rows.device):
            return self._sample(number, noise, generator)

    def covariance(self) -> Tensor:
        """Epistemic covariance of every output (logit) between the data, ``[o, N, N]``.

        Raises:
            TypeError: for classes, whose logits depend on each other.
        """
        if self.posterior.head.kind == "multiclass":
            raise TypeError(
                "covariance() is for values and binary outputs: draw classes, sample()."
            )
        with in_full_precision(self.rows.device):
            return self.posterior.covariance(self.rows) * self._rows("factor")[:, None, None]

    @property
    def output(self) -> Tensor:
        """Mean of the head's outputs: values, or logits over the temperature."""
        return self._back(self._rows("output"))

    @property
    def output_variance(self) -> Tensor:
        """Variance of the head's outputs under the posterior of its weights.

        Of a regression without the factor of a Student-t; of classes without their common mode,
        which no probability depends on.
        """
        return self._back(self._rows("output_variance"))

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _sample(self, number: int, noise: bool, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _rows(self, name: str) -> Tensor:
        """What the reading has of a member."""
        return self._reading.part(name, self._place)

    def _own(self, name: str) -> Tensor:
        """A buffer of the posterior in the precision of the prediction."""
        buffer: Tensor = getattr(self.posterior, name)
        return buffer.to(self.rows.dtype)

    def _back(self, rows: Tensor, lead: int = 0) -> Tensor:
        """``[…, N, o]`` in the shape of the output; ``lead``: dimensions in front."""
        if rows.dim() == 2 and len(self._reading.shape) == 1:
            return rows
        shaped = rows.reshape(*rows.shape[:lead], *self._reading.shape, rows.shape[-1])
        return shaped.movedim(-1, lead + 1) if self.posterior.head.channels_first else shaped

"""What is predicted of one task at a batch of inputs, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Distribution

from bayesagg.predicting.state import HeadPosterior

__all__ = ["CHUNK", "Prediction"]

CHUNK = 1 << 22  # elements of the largest intermediate; bounds the extra memory of dense heads


class Prediction:
    """Predictive distribution of a task's labels at the data that its head received.

    Tensors have the shape of the head's output: ``[..., o]``, or ``[B, o, ...]`` of a convolution.
    They are computed when they are first asked for.

    Args:
        posterior: of the head, as it was calibrated.
        features: what the head's last linear layer received.
    """

    def __init__(self, posterior: HeadPosterior, features: Tensor) -> None:
        self.posterior, first = posterior, posterior.layout.channels_first
        shape = features.shape
        self._shape = (shape[0], *shape[2:]) if first else shape[:-1]
        self._h = posterior.augmented(posterior.layout.flat(features))
        self._scale = posterior.scale.to(self._h.dtype)

    @property
    def rows(self) -> Tensor:
        """``h̃`` of every datum (position), ``[N, D]``."""
        return self._h

    @property
    def mean(self) -> Tensor:
        """Expected label: a value, or probabilities."""
        raise NotImplementedError

    @property
    def epistemic(self) -> Tensor:
        """Variance that more data would remove: that of the value, or of the probabilities."""
        raise NotImplementedError

    @property
    def aleatoric(self) -> Tensor:
        """Variance of the label that is left if the weights were known, on average."""
        raise NotImplementedError

    @property
    def distribution(self) -> Distribution:
        """Of the label, from ``torch.distributions``."""
        raise NotImplementedError

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of the label: ``√(epistemic + aleatoric)``."""
        return (self.epistemic + self.aleatoric).sqrt()

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central interval of the value, or of the probabilities, that holds with some probability.

        Args:
            level: the probability, between 0 and 1.

        Returns:
            lower and upper ends.

        Raises:
            ValueError: for a level out of range.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level!r}.")
        return self._interval(level)

    def _interval(self, level: float) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def sample(
        self,
        number: int = 1,
        *,
        noise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws of the values (probabilities), jointly for the batch: one set of weights a draw.

        Args:
            number: of draws, ``n``.
            noise: draw labels (class indices without the dimension of classes) instead.
            generator: of the random numbers.

        Returns:
            ``n`` in front of the shape of the head's output.
        """
        raise NotImplementedError

    @cached_property
    def output(self) -> Tensor:
        """Mean of the head's outputs: values, or logits over the temperature."""
        return self._back(self._location)

    @cached_property
    def output_variance(self) -> Tensor:
        """Variance of the head's outputs under the posterior of its weights.

        Of classes without their common mode, which no probability depends on.
        """
        return self._back(self._variance)

    @cached_property
    def _location(self) -> Tensor:
        return self.posterior.location(self._h)

    @cached_property
    def _variance(self) -> Tensor:
        return self._by_rows(self.posterior.variance, self.posterior.per_row())[0]

    def _by_rows(
        self, function: Callable[..., Tensor | tuple[Tensor, ...]], each: int, *more: Tensor
    ) -> tuple[Tensor, ...]:
        """A function of ``h̃`` and other rows, some data at a time; ``each``: elements a datum."""
        size = max(1, CHUNK // max(each, 1))
        rows = (self._h, *more)
        # A traced graph has no loop whose length depends on the batch.
        whole = torch.compiler.is_compiling() or self._h.shape[0] <= size
        parts = [rows] if whole else zip(*(r.split(size) for r in rows), strict=True)
        found = [function(*part) for part in parts]
        pieces = [(one,) if isinstance(one, Tensor) else one for one in found]
        return tuple(p[0] if len(p) == 1 else torch.cat(p) for p in zip(*pieces, strict=True))

    def _back(self, rows: Tensor, lead: int = 0) -> Tensor:
        """``[…, N, o]`` in the shape of the output; ``lead``: dimensions in front."""
        shaped = rows.reshape(*rows.shape[:lead], *self._shape, rows.shape[-1])
        return shaped.movedim(-1, lead + 1) if self.posterior.layout.channels_first else shaped

    def _per_output(self, values: Tensor) -> Tensor:
        """``[o]`` so that it broadcasts with the output."""
        if not self.posterior.layout.channels_first:
            return values
        return values.view(-1, *(1 for _ in self._shape[1:]))

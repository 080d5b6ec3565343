"""What is known of a batch: observations at the outputs, verified labels, additive evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Labels", "Observation", "Statistics", "total_over_labels"]


@dataclass
class Observation:
    """What the loss of one head, or of several, says at its output, before anything is believed.

    Attributes:
        output: head output, ``[N, o]``, detached.
        gradient: ``∂loss/∂output``, ``[N, o]``.
        curvature: diagonal of ``∂²loss/∂output²``, ``[N, o]``; ``None`` where not asked for.
        loss: value of the loss of each head, ``[H]``.
        target: what the user passed, flattened to ``[N]`` or ``[N, o]``; ``None``: recover.
        owners: index of the head of every output, ``[o]``; ``None`` for one head.
    """

    output: Tensor
    gradient: Tensor
    curvature: Tensor | None
    loss: Tensor
    target: Tensor | None
    owners: Tensor | None = None

    @staticmethod
    def join(parts: Sequence[Observation]) -> Observation | None:
        """Several heads as one, ``None`` where they differ in dtype or have targets."""
        first = parts[0].output
        curvatures = [part.curvature for part in parts if part.curvature is not None]
        if (
            any(part.target is not None or part.output.dtype != first.dtype for part in parts)
            or any(part.gradient.dtype != first.dtype for part in parts)
            or len(curvatures) != len(parts)
        ):
            return None
        sizes = torch.tensor([part.output.shape[1] for part in parts])
        owners = torch.repeat_interleave(torch.arange(len(parts)), sizes)
        return Observation(
            torch.cat([part.output for part in parts], dim=1),
            torch.cat([part.gradient for part in parts], dim=1),
            torch.cat(curvatures, dim=1),
            torch.cat([part.loss for part in parts]),
            None,
            owners.to(first.device),
        )

    def per_head(self, values: Tensor) -> Tensor:
        """Sum of ``values``, ``[o]``, over the outputs of each head, ``[H]``."""
        if self.owners is None:
            return values.sum(0, keepdim=True)
        return values.new_zeros(len(self.loss)).index_add_(0, self.owners, values)


@dataclass
class Labels:
    """Verified labels of one block.

    Attributes:
        outputs: ``[N, K]``, or ``[N, K, C]`` for multi-class tasks.
        targets: of the same shape; finite also where not present.
        factor: the loss per unit of likelihood, ``[N, K]`` or ``[1, K]``, positive: a mean over
            ``B`` data with task weight ``c`` has factor ``c / B``.
        present: ``[N, K]`` booleans, or ``None`` where every label is there.
    """

    outputs: Tensor
    targets: Tensor
    factor: Tensor
    present: Tensor | None

    @staticmethod
    def stack(parts: Sequence[Labels]) -> Labels:
        """Labels of several heads as those of one block."""
        if len(parts) == 1:
            return parts[0]
        rows = parts[0].outputs.shape[0]
        present = None
        if any(part.present is not None for part in parts):
            present = torch.cat(
                [
                    torch.ones(p.outputs.shape[:2], dtype=torch.bool, device=p.outputs.device)
                    if p.present is None
                    else p.present
                    for p in parts
                ],
                dim=1,
            )
        factors = [part.factor for part in parts]
        if any(f.shape[0] != 1 for f in factors):
            factors = [f.expand(rows, -1) for f in factors]
        return Labels(
            torch.cat([part.outputs for part in parts], dim=1),
            torch.cat([part.targets for part in parts], dim=1),
            torch.cat(factors, dim=1),
            present,
        )

    def to(self, dtype: torch.dtype) -> Labels:
        """In the dtype of the posterior algebra."""
        return Labels(
            self.outputs.to(dtype), self.targets.to(dtype), self.factor.to(dtype), self.present
        )

    def rows(self, start: int, stop: int) -> Labels:
        """The labels of data ``start`` to ``stop``."""
        if start == 0 and stop == len(self.outputs):
            return self
        factor = self.factor if self.factor.shape[0] == 1 else self.factor[start:stop]
        present = None if self.present is None else self.present[start:stop]
        return Labels(self.outputs[start:stop], self.targets[start:stop], factor, present)


@dataclass
class Statistics:
    """Additive evidence: ``precision`` ``[G, M, M]``, ``shift`` ``[K, M]``, ``count`` ``[K]``.

    ``extra`` holds further sums of a likelihood, ``[K]`` each. All of it adds over batches and
    over data-parallel ranks.
    """

    precision: Tensor
    shift: Tensor
    count: Tensor
    extra: dict[str, Tensor]

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.precision + other.precision,
            self.shift + other.shift,
            self.count + other.count,
            {key: value + other.extra[key] for key, value in self.extra.items()},
        )

    def add_(self, other: Statistics) -> Statistics:
        """Sum, in the memory of this one where the shapes allow."""
        if self.precision.shape[0] < other.precision.shape[0]:
            return self + other
        if self.precision.numel() > 0:  # there is a posterior
            self.precision.add_(other.precision)
            self.shift.add_(other.shift)
        self.count.add_(other.count)
        for key, value in self.extra.items():
            value.add_(other.extra[key])
        return self

    def tensors(self) -> dict[str, Tensor]:
        """All parts, by name."""
        return {
            "precision": self.precision,
            "shift": self.shift,
            "count": self.count,
            **{f"extra.{key}": value for key, value in self.extra.items()},
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Statistics:
        """Inverse of :meth:`tensors`; copies."""
        extra = {
            key.removeprefix("extra."): value.clone()
            for key, value in tensors.items()
            if key.startswith("extra.")
        }
        precision, shift, count = (tensors[n].clone() for n in ("precision", "shift", "count"))
        return Statistics(precision, shift, count, extra)


def total_over_labels(values: Tensor, labels: Labels) -> Tensor:
    """Sum of ``values``, ``[N, K]``, over the data that have a label, ``[K]``."""
    return (values if labels.present is None else values * labels.present).sum(0)

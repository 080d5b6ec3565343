"""Squared errors: ``f (z - y)²``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bayesagg.reading.likelihood import PerOutput
from bayesagg.reading.observed import Found, Observed, Read, tolerance, value_tolerance

__all__ = ["Regression"]


class Regression(PerOutput):
    """Labels of regression heads."""

    kind: ClassVar[str] = "regression"
    needs_factor: ClassVar[bool] = True
    loss_name: ClassVar[str] = "a squared error of constant weight"
    hints: ClassVar[str] = (
        "labels of another shape than the output (they broadcast), an activation on the output, "
        "outputs that are pooled or interpolated (do so to the features instead), weights, a "
        "regulariser in the loss, or a classification, which needs a BinaryHead or MulticlassHead"
    )

    other_labels: ClassVar[str] = (
        "Pass the labels that it compares the head's output with, or leave `targets=` out: they "
        "are read off the loss."
    )

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """``(z - y)²``."""
        return (output - target).square()

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """``2 (z - y)``."""
        difference = output - target
        return difference + difference

    def curved(self, output: Tensor, v: Tensor) -> Tensor:
        """``2 v``."""
        return 2 * v

    def noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Of a difference between rounded numbers, beside what is relative to the residual."""
        return output.abs() * (4 * eps)

    def curvature_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """None."""
        return 0.0

    def value_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """None that is not relative to the value."""
        return 0.0

    def valid(self, target: Tensor) -> Tensor:
        """All are finite."""
        total = target.sum()
        return (total - total).logical_not()

    def read(
        self, observed: Observed, factor: Tensor | None, present: Tensor | None = None
    ) -> Read:
        """``y = z - g / 2f``, if no derivative vanishes and the loss has the value ``Σ g²/4f``."""
        assert factor is not None
        z, g = observed.output, observed.gradient
        r = g / factor
        y = torch.add(z, r, alpha=-0.5)
        squares = g * r
        agrees = observed.agrees(squares.sum(0), value_tolerance(observed.eps), times=4)
        if present is not None:  # a label without a residual would be missing in the value
            return Read(y, factor, present, (agrees,))
        # Without a derivative there is no label, or no residual: second derivatives tell.
        return Read(y, factor, None, (agrees, squares.amin(0).bool()))

    def recover(self, observed: Observed) -> Found:
        """``2f`` is the second derivative, one number per output where there is a label."""
        z, g = observed.output, observed.gradient
        tol = tolerance(observed.eps)
        ratios = [curved / v / 2 for v, curved in observed.probes]
        present = ratios[0] != 0
        count = present.sum(0, keepdim=True).clamp(min=1)
        factor = ratios[0].sum(0, keepdim=True) / count
        holds = present | (g == 0)
        for ratio in ratios:
            holds = holds & torch.where(
                present, (ratio - factor).abs() <= tol * factor.abs(), ratio == 0
            )
        scale = torch.where(factor > 0, factor, 1)
        r = g / scale
        value, tiny = (g * r).sum(0) / 4, torch.full_like(scale[0], torch.finfo(z.dtype).tiny)
        valid = observed.agrees(value, value_tolerance(observed.eps), tiny)
        valid = valid & observed.all_of_head(holds.all(0) & (factor[0] >= 0))
        return Found(torch.add(z, r, alpha=-0.5), scale, present, valid)

"""Binary cross-entropies: ``f (softplus(z) - y z)``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bayesagg.errors import TargetError
from bayesagg.reading.likelihood import PerOutput
from bayesagg.reading.observed import Found, Observed, Read, Said, tolerance

__all__ = ["Binary"]

_MANY = 1e30  # times what a soft label is off 0 and 1: more than any sum of logits


class Binary(PerOutput):
    """Labels of binary heads: probabilities, snapped to 0 and 1 where they are close."""

    kind: ClassVar[str] = "binary"
    needs_factor: ClassVar[bool] = True
    loss_name: ClassVar[str] = "a binary cross-entropy of constant weight on logits"
    hints: ClassVar[str] = (
        "outputs that are pooled or interpolated (do so to the features instead), class or "
        "example weights, a focal term, or a regulariser in the loss"
    )

    other_labels: ClassVar[str] = (
        "Pass the labels that it compares the head's output with (with label smoothing the "
        "smoothed ones), or leave `targets=` out: they are read off the loss."
    )

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.binary_cross_entropy_with_logits(output, target, reduction="none")

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """``σ(z) - y``."""
        return output.sigmoid() - target

    def curved(self, output: Tensor, v: Tensor) -> Tensor:
        """``σ(1-σ) v``."""
        return output.sigmoid() * (-output).sigmoid() * v

    def noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Of a probability."""
        return eps

    def curvature_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """``1 - σ`` is rounded for positive logits; for negative ones all is exact."""
        return eps * (output > 0)

    def value_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Of ``z`` and of ``1 + exp(-|z|)``."""
        return eps * (1 + output.abs())

    def valid(self, target: Tensor) -> Tensor:
        """All are probabilities."""
        least, largest = target.aminmax()
        return (least >= 0) & (largest <= 1)

    def raise_invalid(self, said: Said) -> None:
        """A target that is no probability.

        Raises:
            TargetError: for one.
        """
        super().raise_invalid(said)
        assert said.target is not None
        y = said.target[~said.target.isnan()]
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise TargetError(
                f"task {said.name!r}: binary targets must lie in [0, 1], got {float(y.min()):g} "
                f"to {float(y.max()):g}. Use NaN for a missing label."
            )

    def read(
        self, observed: Observed, factor: Tensor | None, present: Tensor | None = None
    ) -> Read:
        """``y = σ(z) - g / f``, if the loss has the value ``Σ f H + g z``.

        The entropy H of σ(z) tells the factor. Of confident data it may vanish in rounding: that is
        allowed for where labels are 0 or 1, since any others might be those of another factor.
        """
        assert factor is not None
        z, g, eps = observed.output, observed.gradient, observed.eps
        p, f = z.sigmoid(), factor[0]
        y = p - g / f
        # A saturated datum on the right side has no gradient; others without one have no label.
        open_ = F.hardshrink(torch.addcmul(p, p, p, value=-1), eps)
        shown = torch.logical_or(g, open_.logical_not() if present is None else open_)
        if present is not None:
            shown = shown | _exact(z, p, eps)
        fits = shown & (y == y.clamp(-_snap(eps), 1 + _snap(eps)))
        y = _snapped(y, eps)
        nll = self.value(z, y)
        entropy = torch.addcmul(nll, y - p, z)
        entropy = (entropy if present is None else entropy * present).sum(0)
        value, tol = torch.addcmul((g * z).sum(0), entropy, f), tolerance(eps)
        rounding = torch.linalg.vector_norm(z, 1, dim=0)
        soft = observed.mean_of_head(y.frac().amax(0))
        rounding = rounding.sub_(soft, alpha=_MANY).clamp_(0)  # none if a label is soft
        size = torch.add(entropy, rounding, alpha=2 * eps / tol) * f
        agrees = observed.agrees(value, tol, size=size)
        return Read(y, factor, present, (fits.all(0), agrees), nll)

    def recover(self, observed: Observed) -> Found:
        """The second derivative ``f σ(1-σ)`` gives the factor, as far as it can be seen."""
        z, g = observed.output, observed.gradient
        tol, eps = tolerance(observed.eps), observed.eps
        p = z.sigmoid()
        spread = p * (-z).sigmoid()
        curvatures = [curved / v for v, curved in observed.probes]
        c = curvatures[0]
        missing = (g == 0) & (c == 0) & ((spread > eps) | _exact(z, spread, eps))
        known, negative, zero = ~missing, z < 0, torch.zeros_like(z)
        # The curvature is f σ(1-σ) to eps / (1 - σ); for negative logits it is exact.
        usable = known & (torch.where(negative, spread / eps, spread) > min(tol / 10, 10 * eps))
        hidden = known & ~usable
        right = hidden & (g.abs() <= 2 * c)
        exact = _exact(z, spread, eps) & (c > 0)
        factor = _factor(observed, c, spread, usable, exact, hidden & ~right)[None]
        rounding = torch.where(negative, zero, 4 * eps / spread) + 1.25 * tol
        y = torch.where(right, p.round(), p - g / factor).masked_fill_(missing, 0)
        # Where the factor of a datum cannot be seen, a weight and a soft label are the same.
        hard = torch.minimum(y.abs(), (1 - y).abs()) <= 4 * tol
        valid = (factor > 0) & (hard | ~hidden)
        # For a negative logit, whose σ is exact, the gradient is f σ, or f on the wrong side.
        valid = valid & (right | ~(hidden & exact) | (2 * g.abs() > factor))
        for curvature in curvatures:
            off = (curvature / spread / factor - 1).abs()
            valid = valid & ((off <= rounding) | ~usable) & ((curvature == 0) | ~missing)
        fine = (valid & ((y - 0.5).abs() < 0.5 + 4 * tol)).all(0)
        y = _snapped(y, eps)
        # A loss with the same derivatives at these outputs has another value.
        value = (factor * self.value(z, y) * known).sum(0)
        noise = (factor * self.value_noise(z, eps)).sum(0)
        blind = observed.per_head((~(usable | exact | hidden & ~right).any(0)).to(z.dtype)) > 0
        agrees = observed.agrees(value, 8 * tol, noise) | blind
        return Found(y, factor, known, agrees & observed.all_of_head(fine))


def _exact(output: Tensor, spread: Tensor, eps: float) -> Tensor:
    """Where a label, even one that saturation all but hides, has derivatives that are not zero."""
    return (output < 0) & (spread > torch.finfo(output.dtype).tiny / eps)


def _snap(eps: float) -> float:
    """How close to 0 or 1 is close."""
    return max(4 * eps, 4e-3)


def _snapped(y: Tensor, eps: float) -> Tensor:
    """Labels at 0 and 1 where they are close; overwritten."""
    snap = _snap(eps)
    return y.masked_fill_(y < snap, 0).masked_fill_(y > 1 - snap, 1)


def _factor(
    observed: Observed,
    curvature: Tensor,
    spread: Tensor,
    usable: Tensor,
    exact: Tensor,
    wrong: Tensor,
) -> Tensor:
    """Factor of the loss, ``[K]``, from the best evidence that the batch has.

    The curvature of data that are not saturated, without positive logits that nearly are, whose
    curvature is rounded, if there are others; else of negative saturated logits, whose small
    ``σ(1-σ)`` is exact; else the gradient of saturated data on the wrong side, which is the factor;
    else (all right: there is no gradient) that of a mean.
    """
    z, eps = observed.output, observed.eps
    precise = usable & ((z < 0) | (spread > 16 * eps / tolerance(eps)))
    factor = torch.full_like(z[0], 1 / len(z))
    largest = (observed.gradient.abs() * wrong).amax(0)
    factor = torch.where(wrong.any(0), largest, factor)
    for chosen in (exact, usable, precise):
        ratio = (curvature * chosen).sum(0) / (spread * chosen).sum(0)
        factor = torch.where(chosen.any(0), ratio, factor)
    return factor

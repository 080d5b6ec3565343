"""Cross-entropies over classes: ``-f Σ y log softmax(z)``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bayesagg.errors import TargetError
from bayesagg.reading.observed import Found, Observed, Read, Said, tolerance
from bayesagg.reading.targets import Targets, flat_target

__all__ = ["Multiclass"]

IGNORE_INDEX = -100


class Multiclass:
    """Labels of multi-class heads: classes if read, classes or probabilities if given."""

    kind: ClassVar[str] = "multiclass"
    needs_factor: ClassVar[bool] = False
    loss_name: ClassVar[str] = "a cross-entropy of constant weight on logits"
    hints: ClassVar[str] = (
        "outputs that are pooled or interpolated (do so to the features instead), class or "
        "example weights, a temperature, a regulariser in the loss, or soft or smoothed labels, "
        "whose targets are the probabilities that the loss compares with, one per class"
    )

    other_labels: ClassVar[str] = (
        "Pass the probabilities that it compares with, one per class: with label smoothing the "
        "smoothed ones."
    )

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return -(target * output.log_softmax(0)).sum(0)

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """``p - y``."""
        return output.softmax(0) - target

    def curved(self, output: Tensor, v: Tensor) -> Tensor:
        """``(diag p - p pᵀ) v``."""
        pv = output.softmax(0)
        return pv * (v - (pv * v).sum(0))

    def size(self, a: Tensor) -> Tensor:
        """Largest absolute value over classes."""
        return a.abs().amax(0)

    def against(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``a · b`` and ``b · b`` over classes."""
        return (a * b).sum(0), (b * b).sum(0)

    def noise(self, output: Tensor, eps: float) -> Tensor:
        """Of probabilities: their own, that of the logarithm of their sum, and that of the sum.

        The logarithm is as large as ``z``; a sum of many classes, of which one is all but certain,
        loses half a unit of rounding with each.
        """
        rounding = torch.finfo(output.dtype).eps
        of_logarithm = 4 * rounding * (1 + output.amax(0).abs())
        return of_logarithm + (eps + rounding * len(output) / 2)

    def curvature_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Of probabilities and sums of them."""
        return 4 * self.noise(output, eps)

    def value_noise(self, output: Tensor, eps: float) -> Tensor:
        """Of ``z`` and of ``1 + Σ exp``."""
        return eps * (1 + output.abs().amax(0))

    def targets(self, saids: list[Said], like: Tensor, partial: bool) -> Targets:
        """Classes, -100 is missing; or probabilities, NaN is missing."""
        flat = [_checked_shape(said, like) for said in saids]
        if any(target.is_floating_point() for target in flat):
            parts = [_probabilities(target, like) for target in flat]
            y, missing, valid = (torch.stack(part, -1) for part in zip(*parts, strict=True))
        else:
            classes = flat[0][:, None] if len(flat) == 1 else torch.stack(flat, 1)
            y, missing, valid = _one_hot(classes, like)
        return Targets(y, ~missing, valid.all()) if partial else Targets(y, None, valid.all())

    def raise_invalid(self, said: Said) -> None:
        """A class that there is not, or numbers that are no probabilities.

        Raises:
            TargetError: for one.
        """
        classes = said.layout.outputs
        like = said.rows([call.output for call in said.calls])[:, None].permute(2, 0, 1)
        if bool(self.targets([said], like, True).valid):
            return
        assert said.target is not None
        if said.target.is_floating_point():
            raise TargetError(
                f"task {said.name!r}: probability targets must be >= 0 and sum to one. Pass those "
                f"that the loss compares with, NaN where there is none."
            )
        raise TargetError(
            f"task {said.name!r}: a class index lies outside 0 to {classes - 1} (and is not the "
            f"ignore index {IGNORE_INDEX})."
        )

    def read(
        self, observed: Observed, factor: Tensor | None, present: Tensor | None = None
    ) -> Read:
        """``y = p - g / f``, which must be one class."""
        if factor is None:
            return self._read_any(observed)
        z, g, eps = observed.output, observed.gradient, observed.eps
        tol = tolerance(eps)
        log_p = z.log_softmax(0)
        soft = log_p.exp().addcdiv_(g, factor, value=-1)
        # Of a saturated datum, which has no derivative, the largest probability.
        label = soft.max(0, keepdim=True).indices  # faster than argmax
        y = torch.zeros_like(z).scatter_(0, label, 1.0)
        nll = -log_p.gather(0, label)[0]
        fits = (soft.sub_(y).abs_().amax(0) <= tol).all(0)
        shown = torch.logical_or(g.amax(0) > 0, nll <= eps).all(0)  # else there is no label
        # Rounding of the logits is nothing beside the tolerance but in low precision.
        noise = self._noise(z, factor, eps) if eps > 1e-6 else None
        agrees = observed.agrees((nll * factor).sum(0), tol, noise)
        return Read(y, factor, None, (fits, shown, agrees), nll)

    def _read_any(self, observed: Observed) -> Read:
        """Of any factor, which follows from the other classes, and with labels missing."""
        z, g, eps = observed.output, observed.gradient, observed.eps
        tol, tiny = tolerance(eps), torch.finfo(z.dtype).tiny
        log_p = z.log_softmax(0)
        p = log_p.exp()
        missing = (g == 0).all(0) & (p.amax(0) < 1 - eps)  # else saturated, though labelled
        label = _label(z, g)
        y = torch.zeros_like(z).scatter_(0, label, 1.0)
        others = 1 - y
        wrong = (p * others).sum(0) * ~missing
        wrong = wrong * (wrong > tiny / torch.finfo(z.dtype).eps)
        positive = ((g * others).sum(0) * (wrong > 0)).sum(0)
        found = positive / wrong.sum(0)
        found = torch.where(found != 0, found, 1 / len(g[0])).nan_to_num(1 / len(g[0]))
        deviation = ((g - found * (p - y)).abs().amax(0) * ~missing).amax(0)
        nll = -log_p.gather(0, label)[0] * ~missing
        agrees = observed.agrees(found * nll.sum(0), tol, self._noise(z, found[None], eps))
        return Read(y, found[None], ~missing, (found > 0, deviation <= tol * found, agrees))

    def _noise(self, output: Tensor, factor: Tensor, eps: float) -> Tensor:
        return factor[0] * self.value_noise(output, eps).sum(0)

    def recover(self, observed: Observed) -> Found:
        """As :meth:`read`, and second derivatives must be ``f (diag p - p pᵀ)`` in every datum.

        Beside a class that is all but certain others are nothing to the tolerance. But they are not
        rounded: there both derivatives are held against the size of these.
        """
        read = self.read(observed, None)
        assert read.present is not None
        z, eps, others = observed.output, observed.eps, 1 - read.target
        p = z.softmax(0)
        bound = read.factor * (tolerance(eps) + self.curvature_noise(z, eps))
        small = (p * others).sum(0) * (tolerance(eps) + 4 * eps * (1 + self.size(z)))
        small = read.factor * small + _least(eps)
        off = self.size(others * (observed.gradient - read.factor * p))
        valid = torch.stack(read.checks).all(0) & ((off <= small) | ~read.present).all(0)
        for v, curved in observed.probes:
            off = curved - read.factor * self.curved(z, v)
            near = (self.size(off) <= bound) & (self.size(off * others) <= 4 * small)
            holds = torch.where(read.present, near, self.size(curved) == 0)
            valid = valid & holds.all(0)
        return Found(read.target, read.factor, read.present, valid)

    def recover_any(self, observed: Observed) -> Found:
        """Labels that may be probabilities: ``y = p - g / f``, the factor from the curvature."""
        z, g, eps = observed.output, observed.gradient, observed.eps
        tol, noise = tolerance(eps), self.curvature_noise(z, eps)
        v, curved = observed.probes[0]
        along, length = self.against(curved, self.curved(z, v))
        factor = along.sum(0, keepdim=True) / length.sum(0, keepdim=True)
        y = z.softmax(0) - g / factor
        holds = (y.amin(0) > -4 * tol) & (factor > 0)
        for v, curved in observed.probes:
            off = self.size(curved - factor * self.curved(z, v))
            holds = holds & (off <= factor * (tol + noise))
        y = y.clamp(0, 1)
        agrees = observed.agrees((factor * self.value(z, y)).sum(0), 8 * tol)
        return Found(y, factor, None, agrees & holds.all(0))


def _least(eps: float) -> float:
    """Below which derivatives of such a rounding lose digits: the end of the range of its dtype."""
    for limits in map(torch.finfo, (torch.float64, torch.float32)):
        if eps <= limits.eps:
            return limits.tiny / limits.eps
    return 2.0**-23  # of float16; bfloat16 has more


def _label(z: Tensor, g: Tensor) -> Tensor:
    """The class whose derivative is negative, ``[1, N, K]``; of a saturated datum the largest."""
    least, label = g.min(0)
    return torch.where(least < 0, label, z.max(0).indices)[None]


def _checked_shape(said: Said, like: Tensor) -> Tensor:
    """Targets of a head, ``[N]`` classes or ``[N, C]`` probabilities.

    Raises:
        TargetError: for another shape.
    """
    target = flat_target(said)
    classes, rows = len(like), like.shape[1]
    if target.is_floating_point():
        if tuple(target.shape) != (rows, classes):
            raise TargetError(
                f"task {said.name!r}: probability targets flatten to {list(target.shape)}, the "
                f"head's output to {[rows, classes]}; class indices must have an integer dtype."
            )
        return target
    if target.dim() == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if tuple(target.shape) != (rows,):
        raise TargetError(
            f"task {said.name!r}: class targets flatten to {list(target.shape)} for {rows} data; "
            f"pass one class index per datum."
        )
    return target


def _one_hot(classes: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Classes ``[N, K]`` as probabilities, ``[C, N, K]``; which are missing; which are valid."""
    missing = classes == IGNORE_INDEX
    label = classes.clamp(0, len(like) - 1).long()
    y = like.new_zeros(len(like), *classes.shape).scatter_(0, label[None], 1.0)
    return y, missing, missing | (label == classes)


def _probabilities(target: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of one head as probabilities, ``[C, N]``; which are missing; which are valid."""
    if not target.is_floating_point():
        y, missing, valid = _one_hot(target[:, None], like)
        return y[..., 0], missing[:, 0], valid[:, 0]
    missing = target.isnan().any(1)
    y = target.masked_fill(missing[:, None], 1 / len(like))
    valid = (y >= 0).all(1) & ((y.sum(1) - 1).abs() < 1e-3)
    return y.mT.to(like.dtype), missing, valid

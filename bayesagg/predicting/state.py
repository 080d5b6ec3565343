"""The posterior of one head as it is kept for predictions: a module of buffers.

Two forms hold every covariance. *By vectors*: columns ``w_p ~ N(m_p, Q diag(s_p) Qᵀ)``, one ``Q``
(of eigenvectors) for all, so that they cost ``D²`` however many there are, or one for each. *By a
root*: ``Cov(vec W) = RᵀR`` of all columns together. Columns are the outputs, or what a rotation
turns into them (contrasts of classes, eigenvectors of a Kronecker factor).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg.errors import CheckpointError, NumericalError
from bayesagg.heads import Head

__all__ = ["HeadPosterior", "Inferred", "Posteriors"]

_INFERRED = ("mean", "vectors", "variances", "rotation", "root", "noise", "dof")
_BUFFERS = (*_INFERRED, "scale", "halves")


@dataclass(frozen=True)
class Inferred:
    """What is known of the weights of a head with ``o`` outputs (classes).

    Attributes:
        mean: ``[o, D]``, bias last.
        vectors: ``Q``, ``[G, D, D]``, one for all columns or one for each.
        variances: ``s``, ``[G, P, D]``; of ``P`` columns for each ``Q``.
        rotation: outputs from columns, ``[o, P]``; ``None``: they are the columns.
        root: ``R``, ``[M, P, D]``, in place of vectors and variances.
        noise: ``τ²`` of regressions, ``[o]``.
        dof: ν of their Student-t predictions, ``[o]``; infinite where the noise is given.
    """

    mean: Tensor
    vectors: Tensor | None = None
    variances: Tensor | None = None
    rotation: Tensor | None = None
    root: Tensor | None = None
    noise: Tensor | None = None
    dof: Tensor | None = None

    def part(self, own: slice) -> Inferred:
        """That of some outputs of a regression."""
        assert self.variances is not None and self.noise is not None and self.dof is not None
        whole = self.vectors is not None and len(self.vectors) > 1
        variances = self.variances[own] if whole else self.variances[:, own]
        return Inferred(
            self.mean[own], self.vectors, variances, noise=self.noise[own], dof=self.dof[own]
        )


class HeadPosterior(nn.Module):
    """Weights of a head, ``N(m, S)``, the noise of its labels and how it was calibrated.

    Attributes:
        scale: of regressions ``[o]``, or temperatures of the tasks.
        halves: of intervals of regressions, see :func:`bayesagg.predicting.student.half_widths`.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor
    rotation: Tensor
    root: Tensor
    noise: Tensor
    dof: Tensor
    scale: Tensor
    halves: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head, weight = head, head.linear.weight
        self._noted: tuple[int, Tensor] | None = None
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for name in _BUFFERS:
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=weight.device))

    @property
    def known(self) -> bool:
        """Whether there is anything to predict with."""
        return self.mean.numel() > 0

    @property
    def shared(self) -> bool:
        """Whether all outputs have one set of eigenvectors."""
        return len(self.vectors) == 1 and not self.rotation.numel()

    def set(self, name: str, inferred: Inferred) -> HeadPosterior:
        """Take over a finite posterior of a task; what calibration found is forgotten."""
        self.keep(**{name: getattr(inferred, name) for name in _INFERRED})
        self.keep(scale=torch.ones(self.head.num_tasks), halves=None)
        finite = all(bool(getattr(self, part).isfinite().all()) for part in _INFERRED[:-1])
        if not finite or not bool((self.noise > 0).all()):
            raise NumericalError(
                f"task {name!r}: the posterior of its head is beyond the numbers of "
                f"{self.mean.dtype}, or all labels that training saw were zero to rounding. Bring "
                f"the labels, or what the head reads, nearer to one, or convert the model by "
                f".double()."
            )
        return self

    def note(self) -> None:
        """The head is now as the posterior knows it."""
        weight = self.head.linear.weight
        sharded = hasattr(weight, "full_tensor")
        self._noted = None if sharded else (_version(weight), weight.detach().clone())

    def check_fit(self, name: str) -> None:
        """Warn, once, if the head of a task was trained further; seen without a look at data."""
        weight = self.head.linear.weight
        if self._noted is None or _version(weight) <= self._noted[0]:
            return
        _, noted = self._noted
        if weight.shape == noted.shape and torch.equal(weight, noted.to(weight)):
            self._noted = _version(weight), noted  # changed and changed back, as by an EMA
            return
        self._noted = None
        warnings.warn(
            f"task {name!r}: the weights of its head have changed since the predictor was made. "
            f"If the network was trained further, its posteriors are of other features: make the "
            f"predictor anew.",
            stacklevel=7,
        )

    @torch.inference_mode(False)  # buffers outlive a context that the caller may be in
    def keep(self, **values: Tensor | None) -> None:
        """Take over buffers, contiguous as they would be once loaded."""
        for name, value in values.items():
            own = getattr(self, name)
            value = own.new_empty(0) if value is None else value.detach().to(own)
            setattr(self, name, value.clone(memory_format=torch.contiguous_format))

    def augmented(self, features: Tensor) -> Tensor:
        """``h̃`` of flattened features, ``[N, d]`` to ``[N, D]``, in the precision of predictions.

        At least float32: the weights' own precision, or that of the features if it is higher.
        """
        h = features.to(torch.promote_types(features.dtype, self.mean.dtype))
        return F.pad(h, (0, 1), value=1.0) if self.head.has_bias else h

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadPosterior:
        """As of a module, but ``.half()`` and the like leave float32: half has too few digits."""

        def applied(own: Tensor) -> Tensor:
            new = fn(own)
            dtype = torch.promote_types(new.dtype, torch.float32)
            return new if new.dtype == dtype else own.to(new.device, dtype)

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        return self

    def variance(self, h: Tensor) -> Tensor:
        """Variance of every output, ``h̃ᵀ S h̃``, ``[N, o]``."""
        if self.root.numel():
            return self.factor(h).square().sum(2)
        columns = self._column_variance(h)
        if not self.rotation.numel():
            return columns
        return columns @ self.rotation.to(h.dtype).square().mT

    def factor(self, h: Tensor) -> Tensor:
        """``F`` with ``F Fᵀ`` the covariance of a datum's outputs, ``[N, o, P]``."""
        if self.root.numel():
            m, p, d = self.root.shape
            u = (h @ self.root.to(h.dtype).reshape(m * p, d).mT).view(-1, m, p)
            factor = _cholesky(u.mT @ u)
        else:
            factor = torch.diag_embed(self._column_variance(h).sqrt())
        return self.rotation.to(h.dtype) @ factor if self.rotation.numel() else factor

    def covariance(self, h: Tensor) -> Tensor:
        """Covariances of independent outputs between the data, ``h̃ᵢᵀ S h̃ⱼ``, ``[o, N, N]``."""
        rows = self.whitened(h)
        return rows @ rows.mT

    def whitened(self, h: Tensor) -> Tensor:
        """Rows whose inner products are ``h̃ᵢᵀ S h̃ⱼ``, of independent outputs, ``[o, N, D]``."""
        rotated = (h @ self.vectors.to(h.dtype))[:, None]
        return (rotated * self.variances.to(h.dtype).sqrt()[:, :, None]).flatten(0, 1)

    def deviations(self, number: int, h: Tensor, generator: torch.Generator | None) -> Tensor:
        """Outputs less their mean under draws of the weights, one for all data, ``[n, N, o]``."""
        if self.root.numel():
            m, p, d = self.root.shape
            noise = h.new_empty(number, m).normal_(generator=generator)
            weights = (noise @ self.root.to(h.dtype).view(m, p * d)).view(-1, p, d)
        else:
            noise = h.new_empty(number, *self.variances.shape).normal_(generator=generator)
            noise = noise * self.variances.to(h.dtype).sqrt()
            weights = (noise @ self.vectors.to(h.dtype).mT).flatten(1, 2)
        if self.rotation.numel():
            weights = self.rotation.to(h.dtype) @ weights
        return h @ weights.mT

    def _column_variance(self, h: Tensor) -> Tensor:
        """``[N, G P]``."""
        square = (h @ self.vectors.to(h.dtype)).square()  # [G, N, D]
        return (square @ self.variances.to(h.dtype).mT).transpose(0, 1).flatten(1)

    def per_row(self) -> int:
        """Numbers that an intermediate of :meth:`variance` has for each datum."""
        groups, columns = (self.root if self.root.numel() else self.vectors).shape[:2]
        return groups * columns

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Buffers take the shapes of the state, which depend on how it was fitted."""
        expected = (self.head.out_features, self.head.in_features + self.head.has_bias)
        found = state_dict.get(prefix + "mean")
        if isinstance(found, Tensor) and found.numel() and tuple(found.shape) != expected:
            raise CheckpointError(
                f"the predictor was saved from a head of {tuple(found.shape)} weights, here it "
                f"has {expected}: build the model and its heads as they were."
            )
        for name in _BUFFERS:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor):
                self.keep(**{name: value})
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Posteriors(nn.ModuleList):
    """Those of several heads: equal eigenvectors, as of one Gram matrix, are one tensor."""

    def __init__(self, posteriors: Iterable[HeadPosterior]) -> None:
        super().__init__(posteriors)
        self.register_load_state_dict_post_hook(_settle)  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[HeadPosterior]:
        return super().__iter__()  # type: ignore[return-value]

    def settle(self) -> None:
        """Look for equal ones, and note the heads as they are."""
        kept: list[Tensor] = []
        for posterior in self:
            if posterior.shared:
                own = posterior.vectors
                posterior.vectors = next((v for v in kept if torch.equal(v, own)), own)
                kept += [own] if posterior.vectors is own else []
            posterior.note()

    def check_fit(self, names: Iterable[str]) -> None:
        """Warn of tasks whose heads have changed since."""
        for name, posterior in zip(names, self, strict=True):
            posterior.check_fit(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Posteriors:
        before = [id(posterior.vectors) for posterior in self]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        first: dict[int, Tensor] = {}
        for key, posterior in zip(before, self, strict=True):
            posterior.vectors = first.setdefault(key, posterior.vectors)
        return self


def _settle(posteriors: Posteriors, _: object) -> None:
    posteriors.settle()


def _version(weight: Tensor) -> int:
    """Grows whenever the weight is changed in place."""
    return 0 if weight.is_inference() else weight._version


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factor of ``[N, P, P]``; a zero matrix has one of rounding."""
    size = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None] + torch.finfo(matrix.dtype).tiny
    jitter = 4 * torch.finfo(matrix.dtype).eps * size
    factor: Tensor
    factor, _ = torch.linalg.cholesky_ex(
        matrix + torch.diag_embed(jitter.expand(-1, matrix.shape[-1]))
    )
    return factor

"""What losses say at the outputs of heads, before anything is believed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesagg.heads import Head
from bayesagg.reading.hooks import Call, flatten

__all__ = [
    "Found",
    "Layout",
    "Observed",
    "Read",
    "Said",
    "join",
    "tolerance",
    "value_tolerance",
]


def tolerance(eps: float) -> float:
    """Relative error allowed of derivatives: rounding of the output's dtype, amplified."""
    return max(1e-3, 8 * eps)


def value_tolerance(eps: float) -> float:
    """Relative error allowed of the value of a loss, a sum in which rounding averages out."""
    return max(1e-5, min(1e3 * eps, tolerance(eps)))


@dataclass(frozen=True)
class Layout:
    """What a head's outputs are: its description computes these anew each time it is asked.

    Attributes:
        kind: of the head.
        outputs: of its module.
        tasks: in the sense of the paper.
        classes: of a multi-class head, else 0.
        channels_first: outputs are dimension 1, not the last.
    """

    kind: str
    outputs: int
    tasks: int
    classes: int
    channels_first: bool

    @staticmethod
    def of(head: Head) -> Layout:
        """Of one head."""
        outputs = head.out_features
        classes = outputs if head.kind == "multiclass" else 0
        return Layout(head.kind, outputs, head.num_tasks, classes, head.channels_first)


@dataclass
class Said:
    """One head in one step.

    Attributes:
        name: of the head.
        head: its description.
        layout: of its outputs.
        calls: those whose output some loss depends on, in their order.
        loss: of the task, a scalar with its graph.
        gradients: of all losses at the outputs of the calls.
        target: what the user passed, ``None``: labels are read off the loss.
        eps: rounding of the outputs or of the loss, whichever is larger.
        form: of the loss, see :func:`bayesagg.reading.form.form_of`.
        alone: the loss depends on nothing but the outputs.
        outputs: of the calls.
        key: identity of what the head reads.
        probes: ``v`` and ``H v`` at the outputs of the calls, ``H`` second derivatives.
    """

    name: str
    head: Head
    layout: Layout
    calls: list[Call]
    loss: Tensor
    gradients: list[Tensor]
    target: Tensor | None
    eps: float
    form: int
    alone: bool
    outputs: list[Tensor] = field(init=False)
    key: tuple[int, ...] = field(init=False)
    probes: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outputs = [call.output for call in self.calls]
        self.key = tuple([id(call.features) for call in self.calls])

    def rows(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors like the outputs of the calls as ``[N, o]``."""
        first = self.layout.channels_first
        flat = [t if t.dim() == 2 else flatten(t, first) for t in tensors]
        return flat[0] if len(flat) == 1 else torch.cat(flat)


@dataclass(frozen=True)
class Observed:
    """Heads of one kind side by side, in at least float32.

    Outputs and all that is like them are ``[N, K]``, or ``[C, N, K]`` for multi-class heads:
    operations along a short last dimension take many times as long.

    Attributes:
        output: detached.
        gradient: of all losses at the output.
        losses: value of every head's loss, ``[H]``.
        owners: head of every column, ``[K]``; ``None`` where each has one.
        eps: rounding of the outputs as they were given.
        target: finite also where it is missing; ``None``: to be read.
        present: labels that there are, ``[N, K]``; ``None`` beside no target.
        probes: ``v`` and ``H v``; none: no second derivatives were taken.
    """

    output: Tensor
    gradient: Tensor
    losses: Tensor
    owners: Tensor | None
    eps: float
    target: Tensor | None = None
    present: Tensor | None = None
    probes: tuple[tuple[Tensor, Tensor], ...] = ()

    def per_head(self, values: Tensor) -> Tensor:
        """Sums of ``values``, ``[K]``, over the columns of each head, ``[H]``."""
        if self.owners is None:
            return values
        return values.new_zeros(len(self.losses)).index_add_(0, self.owners, values)

    def mean_of_head(self, values: Tensor) -> Tensor:
        """Means of ``values``, ``[K]``, over the columns of each head, ``[K]``."""
        if self.owners is None:
            return values
        return (self.per_head(values) / self.per_head(torch.ones_like(values)))[self.owners]

    def all_of_head(self, holds: Tensor) -> Tensor:
        """Whether ``holds``, ``[K]``, in every column of each head, ``[H]``."""
        if self.owners is None:
            return holds
        return self.per_head((~holds).to(self.output.dtype)) == 0

    def agrees(
        self,
        value: Tensor,
        allowed: float,
        noise: Tensor | None = None,
        times: float = 1,
        size: Tensor | None = None,
    ) -> Tensor:
        """Whether losses have the values that labels give them, ``[H]``; never if not finite.

        Args:
            value: by column, ``[K]``, not negative.
            allowed: relative error.
            noise: absolute error by column, ``[K]``.
            times: what values are multiples of.
            size: what the relative error is relative to, by column, ``[K]``; ``None``: values.
        """
        value = self.per_head(value)
        off = torch.sub(value, self.losses, alpha=times).abs()
        off = torch.sub(off, value if size is None else self.per_head(size), alpha=allowed)
        return off <= 0 if noise is None else off <= self.per_head(noise)


@dataclass(frozen=True)
class Read:
    """Labels that hold if all checks do.

    Attributes:
        target: as in :class:`Observed`.
        factor: ``[N, K]`` or ``[1, K]``.
        present: ``[N, K]``; ``None``: all.
        checks: vectors of booleans.
        nll: the loss of factor one by datum and task, ``[N, K]``; ``None``: not at hand.
    """

    target: Tensor
    factor: Tensor
    present: Tensor | None
    checks: tuple[Tensor, ...]
    nll: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """Labels of heads side by side, and whether they reproduce what was observed.

    Attributes:
        target: as in :class:`Observed`.
        factor: ``[N, K]`` or ``[1, K]``.
        present: ``[N, K]``; ``None``: all.
        valid: by head, ``[H]``.
        weighted: by head, ``[H]``: the factor differs between data. ``None``: none does.
    """

    target: Tensor
    factor: Tensor
    present: Tensor | None
    valid: Tensor
    weighted: Tensor | None = None


@functools.lru_cache(maxsize=64)
def _owners(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Head of every column; kept, so that no step waits for a copy to the device."""
    index = [i for i, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(index, device=device)


def join(saids: Sequence[Said]) -> Observed:
    """Several heads of one kind (and number of classes) side by side.

    Args:
        saids: their outputs are of one dtype. Nothing here needs a graph: call it without.
    """
    first = saids[0]
    classes = first.layout.classes
    work = torch.promote_types(first.outputs[0].dtype, torch.float32)

    def beside(parts: list[list[Tensor]]) -> Tensor:
        flat = [
            one[0] if len(one) == 1 and one[0].dim() == 2 else said.rows(one)
            for one, said in zip(parts, saids, strict=True)
        ]
        wide = flat[0].detach() if len(flat) == 1 else torch.cat(flat, 1)
        if wide.dtype != work:
            wide = wide.to(work)
        if classes:
            # Data innermost: a plain transpose, which is many times as fast as other copies.
            shape = (wide.shape[1] // classes, classes, wide.shape[0])
            wide = wide.mT.contiguous().view(shape).permute(1, 2, 0)
        return wide

    sizes = tuple([said.layout.tasks for said in saids])
    outputs = beside([said.outputs for said in saids])
    owners = _owners(sizes, outputs.device) if sum(sizes) > len(sizes) else None
    probes = []
    for i in range(len(first.probes)):
        v = beside([said.probes[i][0] for said in saids])
        probes.append((v, beside([said.probes[i][1] for said in saids])))
    losses = torch.stack([said.loss for said in saids])
    return Observed(
        outputs,
        beside([said.gradients for said in saids]),
        losses if losses.dtype == work else losses.to(work),
        owners,
        max([said.eps for said in saids]),
        probes=tuple(probes),
    )

"""Whether weighing tasks will matter: what :mod:`bayesagg.diagnostics` says from a short run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Advice", "advise"]

_ALIKE = 0.8  # measured: docs/when-to-use.md


@dataclass(frozen=True)
class Advice:
    """Whether weighing tasks by their scales will matter; ``str()`` says it in words.

    Attributes:
        scales: loss of every task, of which the inverse is its weight; ``name[i]`` for output i.
        ratio: of the largest scale to the smallest.
        cosine: of the gradients of two tasks at the features, mean over all pairs, -1 to 1.
        agreement: cosine of the plain sum of the gradients with the sum in units of the scales,
            -1 to 1. At 1, weighing changes nothing but the length of the step.
    """

    scales: dict[str, float]
    ratio: float
    cosine: float
    agreement: float

    @property
    def weigh(self) -> bool:
        """Whether weighing is worth it: agreement below 0.8."""
        return self.agreement < _ALIKE

    def __str__(self) -> str:
        """The advice, and the numbers that it follows from."""
        if self.weigh:
            says = "Weigh the tasks: the plain sum goes another way than the sum in equal units."
        else:
            says = "Use linear scalarization: weighing the tasks hardly changes the direction."
        low, high = (f(self.scales, key=self.scales.__getitem__) for f in (min, max))
        numbers = (
            f"scales {self.scales[low]:.3g} ({low}) to {self.scales[high]:.3g} ({high}), "
            f"ratio {self.ratio:.3g}; cosine of two tasks {self.cosine:.2f}; "
            f"agreement of plain and weighed gradient {self.agreement:.2f}"
        )
        return f"{says}\n{numbers}"


def advise(features: Tensor, losses: Mapping[str, Tensor] | Sequence[Tensor]) -> Advice:
    """Whether weighing the tasks will matter, from one large batch after a short run.

    Train with the plain sum of the losses for some hundred steps, then pass what a batch of data
    gives that were not trained on: there a loss is the noise that a task has for this network. The
    model is not changed. A task's weight is one over its loss here, which is what the default rule
    comes close to; what its read-out of the heads gains is not looked at.

    Args:
        features: what all heads read, of any shape, with the graph that the losses have.
        losses: of each task on the batch; scalars, or ``[o]`` for ``o`` outputs of one head.
            Those of a sequence are tasks ``"0"``, ``"1"``, ….

    Returns:
        the numbers and what follows from them.

    Raises:
        ValueError: for fewer than two tasks, or a loss that is of another shape, is not positive,
            does not depend on the features, or has no gradient there.
    """
    named = losses if isinstance(losses, Mapping) else {str(i): v for i, v in enumerate(losses)}
    values = _by_output(named)
    if len(values) < 2:
        raise ValueError(
            "advice needs at least two tasks, got one: pass a loss for each, [o] for o outputs"
        )
    rows = []
    for name, value in values.items():
        row = None
        if value.requires_grad and features.requires_grad:
            [row] = torch.autograd.grad(value, features, retain_graph=True, allow_unused=True)
        if row is None:
            raise ValueError(
                f"the loss of task {name!r} does not depend on the features: pass the tensor that "
                f"its head reads, and compute both with gradients"
            )
        if not bool((row != 0).any()):
            raise ValueError(
                f"the gradient of task {name!r} is zero at the features, so it has no direction: "
                f"train for some steps first, or leave the task out"
            )
        rows.append(row.detach().flatten().double())
    gradients = torch.stack(rows)  # [K, N d]
    scales = torch.stack([value.detach() for value in values.values()]).double()
    unit = F.normalize(gradients, eps=torch.finfo(torch.float64).tiny)
    pairs = len(unit) * (len(unit) - 1)
    plain, weighed = gradients.sum(0), (gradients / scales[:, None].to(gradients)).sum(0)
    return Advice(
        dict(zip(values, scales.tolist(), strict=True)),
        float(scales.max() / scales.min()),
        float(((unit @ unit.mT).sum() - unit.square().sum()) / pairs),
        float(F.cosine_similarity(plain, weighed, dim=0)),
    )


def _by_output(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A scalar for each output."""
    found: dict[str, Tensor] = {}
    for name, value in losses.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the loss of task {name!r} is a {type(value).__name__}: pass the tensor, with its "
                f"graph"
            )
        if value.dim() > 1:
            raise ValueError(
                f"the loss of task {name!r} has shape {tuple(value.shape)}; pass a scalar, or one "
                f"value for each output, [o]"
            )
        parts = (
            {name: value}
            if value.dim() == 0
            else {f"{name}[{i}]": part for i, part in enumerate(value.unbind())}
        )
        for key, part in parts.items():
            if not (part.isfinite() and part > 0):
                raise ValueError(
                    f"the loss of task {key!r} is {part.item():g}; its scale must be positive and "
                    f"finite: pass a likelihood's loss, over at least one label"
                )
        found |= parts
    return found

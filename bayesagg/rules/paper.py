"""The paper's rule: Eq. 2-11 as printed, of one representation that all heads read.

One step: evidence of the batch (Eq. 2, 8-10), a posterior with the last epoch's evidence as prior,
moments of every datum's gradient at h (Eq. 4, 11), and their combination (Eq. 7, or Eq. 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, islice
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bayesagg.aggregation import GradientScale
from bayesagg.errors import CaptureError, HeadError
from bayesagg.heads import Head
from bayesagg.likelihoods import LIKELIHOODS, Evidence
from bayesagg.parallel import Exchange
from bayesagg.posterior import Gaussian
from bayesagg.predicting.state import Inferred
from bayesagg.reading import Batch, Part
from bayesagg.rules.base import Plan, Tasks, uniform_weights
from bayesagg.rules.combine import combine
from bayesagg.rules.epochs import PaperMemory, Update
from bayesagg.rules.groups import make_groups
from bayesagg.rules.inferred import of_paper
from bayesagg.rules.subset import Sample, extend

__all__ = ["PaperRule"]

_ONE_TENSOR = (
    "Under the paper's rule all heads must receive one and the same tensor; the trunk's output "
    "before towers, experts or a dropout of each head is not it. The default rule (leave out "
    "`rule`) serves this network."
)


@dataclass(frozen=True)
class PaperRule:
    """Settings of the paper's rule.

    Heads that leave their settings out have s = 0.8 (regression) or 0.05 (classification), a prior
    variance of 1, a noise variance of 1, moments by quadrature, and the posterior mean as weights
    if they are regressions. Losses without a head pass as they are. Without ``steps_per_epoch``,
    and until ``end_epoch`` is called, evidence fades by the datum in place of epochs, after
    :data:`bayesagg.rules.epochs.WARMUP` steps of linear scalarization.

    Args:
        pretrain_epochs: epochs of linear scalarization first.
        gradient_scale: ``"sum"`` multiplies Eq. 7 by the number of tasks, so that uniform weights
            are linear scalarization; ``"mean"`` is Eq. 7 as printed.
        covariance: ``"diagonal"`` (Eq. 7), or ``"full"`` (Eq. 6).
        max_data: posterior and moments from a random subset of this many data per step, and the
            gradient at the posterior mean for the others (:mod:`bayesagg.rules.subset`); for dense
            heads, where every pixel is a datum. ``None``: from all.

    Raises:
        ValueError: for a setting out of range.
    """

    pretrain_epochs: int = 1
    gradient_scale: GradientScale = "sum"
    covariance: Literal["diagonal", "full"] = "diagonal"
    max_data: int | None = None

    name: ClassVar[str] = "paper"

    def __post_init__(self) -> None:
        _check_choice("gradient_scale", self.gradient_scale, ("sum", "mean"))
        _check_choice("covariance", self.covariance, ("diagonal", "full"))
        if type(self.pretrain_epochs) is not int or self.pretrain_epochs < 0:
            raise ValueError(
                f"pretrain_epochs must be an integer >= 0, got {self.pretrain_epochs!r}."
            )
        if self.max_data is None:
            return
        if type(self.max_data) is not int or self.max_data < 1:
            raise ValueError(f"max_data must be a positive integer or None, got {self.max_data!r}.")
        if self.covariance == "full":
            raise ValueError(
                "max_data goes with covariance='diagonal': the weights of Eq. 6 are matrices, of "
                "which a mean over the subset would say little."
            )

    def start(
        self, tasks: Tasks, dtype: torch.dtype, seed: int, steps_per_epoch: int | None
    ) -> PaperMemory:
        """A memory without evidence; warns of settings that the heads do not use.

        Raises:
            HeadError: if heads of different widths cannot receive one tensor.
        """
        heads = {name: head for name, head in tasks.items() if isinstance(head, Head)}
        if not heads:
            raise HeadError(
                "`heads` has nothing but LossTask(), and the paper's rule weighs heads alone: pass "
                "the head of a task, or use the default rule."
            )
        widths = {head.in_features: name for name, head in heads.items()}
        if len(widths) > 1:
            (one, first), (other, second) = list(widths.items())[:2]
            raise HeadError(
                f"tasks {first!r} and {second!r}: their heads read {one} and {other} dimensions. "
                f"{_ONE_TENSOR}"
            )
        groups = make_groups(heads)
        return PaperMemory(tasks, groups, dtype, seed, self.pretrain_epochs, steps_per_epoch)

    def sets(self, head: Head) -> bool:
        """Whether a posterior sets the weights of a head whose loss is its likelihood."""
        return (head.readout or LIKELIHOODS[head.kind].defaults["readout"]) == "posterior"

    def spared(self, memory: PaperMemory) -> tuple[str, ...]:
        """Heads with ``readout="posterior"``, after pre-training."""
        return () if memory.pretraining else memory.spared()

    def inferred(self, memory: PaperMemory) -> dict[str, Inferred]:
        """Posteriors of all heads of which there is evidence, for predictions."""
        return of_paper(memory)

    def flags(self, memory: PaperMemory, batch: Batch) -> list[bool]:
        """Of every head: whether its data do not all count alike, whether its loss is its own.

        Raises:
            CaptureError: if the heads did not receive one and the same tensor.
        """
        for part in batch.parts[1:]:
            if part.key != batch.parts[0].key:
                raise CaptureError(
                    f"tasks {batch.parts[0].names[0]!r} and {part.names[0]!r}: their heads "
                    f"received different tensors. {_ONE_TENSOR}"
                )
        parts = _by_head(batch)
        found = []
        for name in memory.heads:
            labels = parts[name].labels if name in parts else None
            uneven = labels is None or labels.present is not None or len(labels.factor) > 1
            found += [uneven, name in parts and labels is None]
        return found

    @torch.no_grad()
    def plan(
        self, memory: PaperMemory, batch: Batch, flags: list[bool], exchange: Exchange
    ) -> Plan:
        """The gradient at h, the weights of the tasks, and what the batch teaches.

        Raises:
            NumericalError: if a posterior precision could not be factorized.
        """
        uneven, found = [{*compress(memory.heads, flags[i::2])} for i in range(2)]
        own = memory.owning | found
        kept = {name for name in own if memory.heads[name].writable}  # not those frozen for now
        plan = Plan(weights=uniform_weights(memory.tasks), update=Update(owning=kept))
        if not memory.collects:
            return plan
        generator = torch.Generator(batch.total.device).manual_seed(memory.seed + memory.draws)
        data = Sample.of(memory, batch, own)
        sample = data if self.max_data is None else data.subset(self.max_data, generator)
        evidence, squares = _summed(sample.evidence(uneven), sample.squares(), exchange)
        plan.update = Update(evidence, squares, kept)
        if memory.pretraining:
            return plan
        totals = memory.totals(evidence)
        posteriors = memory.posteriors(totals, plan.update)
        # What learned scales are the means of, now that posteriors are known.
        _, refined = _summed((), sample.squares(posteriors), exchange)
        plan.update = Update(evidence, refined, kept, totals, memory.draws)
        plan.spared = memory.spared(own)
        if memory.fades:
            plan.heads = memory.read_out(posteriors, totals, own)
        # On every rank, also without their losses: weights that are sharded are gathered.
        whole = {name: head.weights() for name, head in memory.heads.items() if name in own}
        if batch.parts:
            gradient, weights = self._gradient(memory, data, sample, posteriors, generator)
            gradient, weights = self._with_own(batch, whole, gradient, weights)
            plan.weights = self._with_others(memory, batch, weights)
            plan.gradients = {batch.parts[0].key: gradient}
        return plan

    def _gradient(
        self,
        memory: PaperMemory,
        data: Sample,
        sample: Sample,
        posteriors: Sequence[Gaussian],
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of all data that have labels, and the weights of all heads."""
        gradient, weights = combine(
            sample,
            posteriors,
            scale=self.gradient_scale,
            full=self.covariance == "full",
            generator=generator,
            dtype=_dtype_of_moments(data.rows, memory.dtype),
        )
        if sample.index is not None:
            gradient = extend(sample, data, posteriors, gradient, weights, self.gradient_scale)
        parts = weights.mean(-1).split([group.num_tasks for group in memory.groups])
        pairs = zip(memory.groups, parts, strict=True)
        return gradient, {n: w for group, part in pairs for n, w in group.by_head(part).items()}

    def _with_own(
        self,
        batch: Batch,
        whole: Mapping[str, Tensor],
        gradient: Tensor,
        weights: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of losses that are not their head's likelihood added, of uniform weight.

        ``whole``: weights of the heads of such losses, ``[o, d]``.
        """
        parts = _by_head(batch)
        present = [name for name in parts if name in whole]
        if not present:
            return gradient, weights
        heads = {name: part.heads[part.names.index(name)] for name, part in parts.items()}
        tasks = sum(head.num_tasks for head in heads.values())
        inferred = 1 - sum(heads[name].num_tasks for name in present) / tasks
        mean = self.gradient_scale == "mean"
        gradient = gradient * (inferred if mean else 1)
        weights = {name: weight * inferred for name, weight in weights.items()}
        for name in present:
            at_output = parts[name].gradient[:, parts[name].slices[name]].flatten(1)
            rows = at_output.to(gradient) @ whole[name].to(gradient)
            gradient = gradient + (rows / tasks if mean else rows)
            weights[name] = torch.full_like(weights[name], 1 / tasks)
        return gradient, weights

    def _with_others(
        self, memory: PaperMemory, batch: Batch, weights: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Shares by task, ``[o]``, of losses without a head too: their gradients count once.

        ``weights``: of the heads, whose sum is one.
        """
        others = [name for name in memory.tasks if name in batch.losses and name not in weights]
        if not others:
            return weights
        mean = self.gradient_scale == "mean"  # what the weights of heads are multiplied by
        heads = 1 if mean else sum(memory.heads[name].num_tasks for name in batch.tasks)
        share, like = 1 / (heads + len(others)), next(iter(weights.values()))
        found = {name: weight * heads * share for name, weight in weights.items()}
        return found | {name: like.new_full((1,), share) for name in others}


def _by_head(batch: Batch) -> dict[str, Part]:
    return {name: part for part in batch.parts for name in part.names}


def _dtype_of_moments(h: Tensor, dtype: torch.dtype) -> torch.dtype:
    """No more digits than the gradient that moments make, but 32 bits of range."""
    own = torch.promote_types(h.dtype, torch.float32)
    return own if torch.finfo(own).bits < torch.finfo(dtype).bits else dtype


def _summed(
    evidence: Sequence[Evidence], squares: Sequence[Tensor | None], exchange: Exchange
) -> tuple[Sequence[Evidence], Sequence[Tensor | None]]:
    """Over all ranks."""
    if exchange.ranks is None:
        return evidence, squares
    sent = [tensor for part in evidence for tensor in part.packed()]
    sums = iter(exchange.sum([*sent, *(square for square in squares if square is not None)]))
    found = [part.unpacked(*islice(sums, 3)) for part in evidence]
    return found, [None if square is None else next(sums) for square in squares]


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")

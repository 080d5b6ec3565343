"""The engine: one ordinary backward pass with the gradient at h replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesagg.aggregation import GradientScale
from bayesagg.capture import Capture, flatten, unflatten
from bayesagg.combine import combine
from bayesagg.errors import CheckpointError, FeatureError
from bayesagg.heads import Head, named_heads
from bayesagg.likelihoods import Block, Labels, Observation, Statistics, make_blocks
from bayesagg.observe import by_task, check_finite, observe
from bayesagg.posterior import augment
from bayesagg.subset import check_max_data, draw, extend, select

__all__ = ["BayesAgg"]

RULES = ("paper",)


@dataclass
class _Plan:
    """What a backward pass will do; empty where it is plain linear scalarization."""

    gradient: Tensor | None = None
    evidence: list[Statistics] = field(default_factory=list)
    weights: Tensor | None = None


class BayesAgg(nn.Module):
    """Bayesian gradient aggregation without an optimizer, for trainers that own it.

    Call :meth:`backward` in place of ``sum(losses).backward()`` and :meth:`end_epoch` at the end
    of every epoch. The watched modules are not registered as submodules.

    Args:
        shared_rep_hook: the last shared module; its output is h. ``None``: h is what the heads
            receive.
        heads: task heads by name, or a sequence of them (named ``"0"``, ``"1"``, …).
        pretrain_epochs: epochs of linear scalarization first.
        gradient_scale: ``"sum"`` multiplies Eq. 7 by the number of tasks, so that uniform weights
            are linear scalarization; ``"mean"`` is Eq. 7 as printed.
        covariance: ``"diagonal"`` (Eq. 7) or ``"full"`` (Eq. 6).
        rule: ``"paper"``: Eq. 2-11, one quadratic expansion at the current head weights, the last
            epoch's full-data posterior as prior.
        dtype: of the posterior algebra.
        seed: of the samples of ``moments="monte_carlo"``, and of the subsets of ``max_data``.
        max_data: posterior and moments from a random subset of this many data per step, and the
            gradient at the posterior mean for the others (:mod:`bayesagg.subset`); for dense
            heads, where every pixel is a datum. ``None``: from all.

    Attributes:
        task_weights: mean weight α per output of the last step, by task, ``[o]``; the weights of
            all outputs sum to one. Uniform during pre-training.
        epoch: epochs completed.

    Raises:
        HeadError: for heads that are not linear, given twice, or do not fit together.
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        shared_rep_hook: nn.Module | None,
        heads: Mapping[str, Head] | Sequence[Head],
        *,
        pretrain_epochs: int = 1,
        gradient_scale: GradientScale = "sum",
        covariance: Literal["diagonal", "full"] = "diagonal",
        rule: str = "paper",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        max_data: int | None = None,
    ) -> None:
        super().__init__()
        _check_choice("gradient_scale", gradient_scale, ("sum", "mean"))
        _check_choice("covariance", covariance, ("diagonal", "full"))
        _check_choice("rule", rule, RULES)
        _check_choice("dtype", dtype, (torch.float32, torch.float64))
        if not isinstance(pretrain_epochs, int) or pretrain_epochs < 0:
            raise ValueError(f"pretrain_epochs must be an integer >= 0, got {pretrain_epochs!r}.")
        self.max_data = check_max_data(max_data, covariance)
        self.heads = named_heads(heads)
        self.pretrain_epochs, self.gradient_scale = pretrain_epochs, gradient_scale
        self.covariance, self.rule, self.dtype, self.seed = covariance, rule, dtype, seed
        self.epoch = 0
        self._draws = 0  # backward passes so far; seeds the samples of the next
        self._blocks = make_blocks(self.heads, dtype)
        self._capture = Capture(shared_rep_hook, self.heads)
        self._staged: list[Statistics] = []  # evidence of backward passes without a step, by block
        self._batches = 0  # backward passes of this epoch that a step has used
        self._pending = False  # a backward pass was made that no step has used yet
        self._channels_first = next(iter(self.heads.values())).channels_first
        self._d = self._blocks[0].d
        uniform = 1 / sum(block.num_tasks for block in self._blocks)
        self.task_weights = {
            name: torch.full((head.num_tasks,), uniform) for name, head in self.heads.items()
        }

    @property
    def pretraining(self) -> bool:
        """Whether steps are still those of linear scalarization."""
        return self.epoch < self.pretrain_epochs

    def backward(
        self,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Fill every ``.grad`` as ``sum(losses).backward()`` would, the gradient at h replaced.

        Args:
            losses: one tensor per task that is present, by name or in the order of the heads;
                reduced by mean or sum, or not at all (then their mean is taken).
            targets: labels, where they cannot be recovered from the losses; same keys. ``NaN``
                (class index: -100) marks a missing label.

        Returns:
            The sum of the losses, detached.

        Raises:
            BayesAggError: a specific subclass for each kind of bad input, before any gradient,
                parameter or buffer has changed.
        """
        total = self._backward(losses, targets)
        self._commit()
        return total

    def end_epoch(self) -> None:
        """Fold the epoch into the full-data posterior, the prior of the next epoch.

        From the end of pre-training on, heads with ``readout="posterior"`` receive its mean.
        An epoch without any step counts for nothing.
        """
        self._commit()
        if self._batches == 0:
            return
        for block in self._blocks:
            block.end_epoch()
        self._batches = 0
        self.epoch += 1
        if self.pretraining:
            return
        for block in self._blocks:
            self._write_heads(block)

    @torch.no_grad()
    def _write_heads(self, block: Block) -> None:
        if block.full is None or all(head.readout == "gradient" for head in block.heads):
            return
        means = block.module_weights(block.posterior(None))
        for name, head in zip(block.names, block.heads, strict=True):
            if head.readout == "posterior" and bool(
                (block.full.count[block.slices[name]] > 0).all()
            ):
                head.write(means[name])

    def _backward(
        self,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
    ) -> Tensor:
        """As :meth:`backward`, with the evidence of the batch staged until :meth:`_commit`."""
        named = by_task(losses, self.heads, "losses")
        given = (
            {}
            if targets is None or len(targets) == 0
            else by_task(targets, self.heads, "targets", named)
        )
        h = self._capture.check(list(named))
        check_finite(named)
        means = {name: loss if loss.dim() == 0 else loss.mean() for name, loss in named.items()}
        total = torch.as_tensor(sum(means.values()))
        observed = observe(means, self._capture.outputs, given, self.heads, self._channels_first)
        plan = _Plan()
        if observed is not None:  # None: gradients overflowed under a GradScaler, which will skip
            plan = self._plan(h, observed)
        # All input is good and all is computed: only from here on does anything change.
        handle = None if plan.gradient is None else h.register_hook(lambda _: plan.gradient)
        try:
            total.backward()
        finally:
            if handle is not None:
                handle.remove()
        self._adopt(plan)
        return total.detach()

    @torch.no_grad()
    def _plan(self, h: Tensor, observed: dict[str, Observation]) -> _Plan:
        """Read the labels, and compute the gradient at h and the evidence of the batch."""
        rows = flatten(h.detach(), self._channels_first)
        if len(rows) == 0:
            raise FeatureError("the batch is empty: skip it, or drop the last batch of the loader.")
        if rows.shape[1] != self._d:
            raise FeatureError(
                f"the shared representation has {rows.shape[1]} dimensions, the heads take "
                f"{self._d}."
            )
        if not bool(torch.isfinite(rows.sum(dtype=self.dtype))):
            raise FeatureError(
                "the shared representation has non-finite values: lower the learning rate, clip "
                "gradients, or check the inputs."
            )
        labels = [block.labels(observed, len(rows), h.device) for block in self._blocks]
        if self.epoch + 1 < self.pretrain_epochs:  # this epoch's evidence would not be used
            return _Plan()
        return self._estimate(h, rows, labels)

    def _estimate(self, h: Tensor, rows: Tensor, labels: list[Labels]) -> _Plan:
        """Evidence, posteriors and the gradient at h, from all data or from a subset."""
        generator = torch.Generator(h.device).manual_seed(self.seed + self._draws)
        subset = None
        if self.max_data is not None:
            subset = draw(labels, len(rows), self.max_data, generator)
        used = (rows if subset is None else rows[subset.index]).to(self.dtype)
        known = labels if subset is None else select(labels, subset.index)
        features = {bias: augment(used, bias) for bias in {b.bias for b in self._blocks}}
        pairs = list(zip(self._blocks, known, strict=True))
        evidence = [block.statistics(features[block.bias], some) for block, some in pairs]
        if subset is not None:
            evidence = [subset.upscale(batch) for batch in evidence]
        if self.pretraining:
            return _Plan(evidence=evidence)
        posteriors = []
        for (block, some), batch in zip(pairs, evidence, strict=True):
            posteriors.append(block.posterior(batch))
            refine = block.refine if subset is None else partial(subset.refine, block)
            refine(features[block.bias], some, posteriors[-1], batch)
        gradient, weights = combine(
            self._blocks,
            features,
            known,
            posteriors,
            scale=self.gradient_scale,
            full=self.covariance == "full",
            generator=generator,
            # Moments need no more digits than the gradient that they make, but 32 bits of range.
            dtype=min(self.dtype, torch.promote_types(h.dtype, torch.float32), key=_bits),
        )
        if subset is not None:
            estimate = (gradient, weights, self.gradient_scale)
            gradient = extend(subset.index, rows, self._blocks, labels, posteriors, *estimate)
        gradient = unflatten(gradient, h, self._channels_first)
        return _Plan(gradient, evidence, weights.mean(-1))

    def _adopt(self, plan: _Plan) -> None:
        """After the backward pass: stage the evidence, keep the weights, spare the heads."""
        self._capture.clear()
        if self._staged and plan.evidence:  # gradient accumulation
            pairs = zip(self._staged, plan.evidence, strict=True)
            self._staged = [old.add_(new) for old, new in pairs]
        elif plan.evidence:
            self._staged = plan.evidence
        self._draws += 1
        self._pending = True
        if plan.weights is not None:
            start = 0
            for block in self._blocks:
                for name, part in block.slices.items():
                    self.task_weights[name] = plan.weights[start + part.start : start + part.stop]
                start += block.num_tasks
        if not self.pretraining:
            for head in self.heads.values():
                if head.readout == "posterior":
                    for parameter in head.parameters():
                        parameter.grad = None  # the optimizer leaves these weights alone

    def _commit(self) -> None:
        """The staged evidence was used by a step: it belongs to the epoch now."""
        self._batches += int(self._pending)
        for block, evidence in zip(self._blocks, self._staged, strict=False):
            block.commit(evidence)
        self._discard()

    def _discard(self) -> None:
        """The staged evidence is used up, or belongs to a step that was not taken."""
        self._staged, self._pending = [], False

    def get_extra_state(self) -> dict[str, Any]:
        """State for ``state_dict``: plain tensors, numbers and dicts."""
        return {
            "heads": [[name, _describe(head)] for name, head in self.heads.items()],
            "epoch": self.epoch,
            "draws": self._draws,
            "batches": self._batches,
            "blocks": [block.state() for block in self._blocks],
            "task_weights": {name: w.clone() for name, w in self.task_weights.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`get_extra_state`.

        Raises:
            CheckpointError: if the state was saved from other heads, or is incomplete; nothing
                has changed then.
        """
        self._install(state, self._read_blocks(state))

    def _read_blocks(self, state: dict[str, Any]) -> list[Block]:
        """Blocks in the state of a checkpoint, which is checked; nothing changes yet."""
        own = [[name, _describe(head)] for name, head in self.heads.items()]
        complete = isinstance(state, dict) and state.keys() == self.get_extra_state().keys()
        if complete and state["heads"] != own:
            raise CheckpointError(
                f"the checkpoint was saved from other heads: it has {state['heads']}, this engine "
                f"{own}. Build the engine with the same heads, in the same order."
            )
        blocks = make_blocks(self.heads, self.dtype)
        if not complete:
            raise CheckpointError(
                "the checkpoint's state of bayesagg is incomplete, or of another version. Save "
                "and load the whole `state_dict()`."
            )
        if len(state["blocks"]) != len(blocks):
            raise CheckpointError(
                "the checkpoint was saved from heads with other settings: heads that differ in "
                "`moments` or `num_samples` are computed apart. Use the settings it was saved with."
            )
        device = next(iter(self.heads.values())).linear.weight.device
        for block, saved in zip(blocks, state["blocks"], strict=True):
            block.load(saved, device)
        return blocks

    def _install(self, state: dict[str, Any], blocks: list[Block]) -> None:
        self._blocks = blocks
        self._discard()
        self.epoch, self._draws = state["epoch"], state["draws"]
        self._batches = state["batches"]
        self.task_weights = {name: w.clone() for name, w in state["task_weights"].items()}

    def extra_repr(self) -> str:
        """Settings and heads."""
        heads = ", ".join(f"{name}: {_describe(head)}" for name, head in self.heads.items())
        return (
            f"rule={self.rule!r}, covariance={self.covariance!r}, "
            f"gradient_scale={self.gradient_scale!r}, pretrain_epochs={self.pretrain_epochs}, "
            f"epoch={self.epoch}, heads={{{heads}}}"
        )


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _describe(head: Head) -> str:
    bias = "" if head.has_bias else ", no bias"
    return f"{head.kind} {head.in_features} -> {head.out_features}{bias}"


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")

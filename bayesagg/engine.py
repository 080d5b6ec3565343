"""The engine: one ordinary backward pass with the gradient at h replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesagg.aggregation import GradientScale
from bayesagg.batch import read_batch
from bayesagg.capture import Capture
from bayesagg.checkpoint import describe, read_blocks
from bayesagg.distributed import Exchange, ProcessGroup
from bayesagg.following import Following, has_gradients
from bayesagg.heads import Head, named_heads
from bayesagg.likelihoods import Block, Rule, Statistics, make_blocks
from bayesagg.plan import Plan, make_plan
from bayesagg.subset import check_max_data

__all__ = ["BayesAgg"]


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
        covariance: ``"diagonal"`` (Eq. 7), or ``"full"`` (Eq. 6, with ``rule="paper"``).
        rule: ``"likelihood"``: every task's gradient is that of its log-likelihood with a learned
            scale: of regressions under a Student-t distribution, predicted without the datum
            itself; of classifications at the current head weights, in units of the running mean
            of the cross-entropy. Diagonal only. ``"paper"``: Eq. 2-11, one quadratic expansion at
            the current head weights, the last epoch's full-data posterior as prior; its settings
            are in :data:`bayesagg.presets.PAPER`.
        dtype: of the posterior algebra.
        seed: of the samples of ``moments="monte_carlo"``, and of the subsets of ``max_data``.
        max_data: posterior and moments from a random subset of this many data per step, and the
            gradient at the posterior mean for the others (:mod:`bayesagg.subset`); for dense
            heads, where every pixel is a datum. ``None``: from all.
        process_group: data-parallel ranks whose evidence is summed, so that all have one
            posterior. ``"auto"``: those over which gradients are averaged: the group of the
            ``DistributedDataParallel`` that ran the forward pass, or of ``fully_shard`` (applied
            before the engine is built). Ranks that train models of their own have neither and are
            left alone. A ``torch.distributed`` group where gradients are averaged by other
            means; ``None``: never.

    Attributes:
        task_weights: mean weight α per output of the last step, by task, ``[o]``; the weights of
            all outputs sum to one, over the rank's own data. Under ``rule="likelihood"`` the scale
            of the likelihood is part of it: what the gradient of each loss is multiplied by, as a
            share. Uniform during pre-training.
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
        rule: Rule = "likelihood",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        max_data: int | None = None,
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        super().__init__()
        _check_choice("gradient_scale", gradient_scale, ("sum", "mean"))
        _check_choice("covariance", covariance, ("diagonal", "full"))
        _check_choice("rule", rule, ("paper", "likelihood"))
        if rule == "likelihood" and covariance == "full":
            raise ValueError("covariance='full' (Eq. 6) needs rule='paper'.")
        _check_choice("dtype", dtype, (torch.float32, torch.float64))
        if not isinstance(pretrain_epochs, int) or pretrain_epochs < 0:
            raise ValueError(f"pretrain_epochs must be an integer >= 0, got {pretrain_epochs!r}.")
        self.max_data = check_max_data(max_data, covariance)
        self.heads = named_heads(heads)
        self.pretrain_epochs, self.gradient_scale = pretrain_epochs, gradient_scale
        self.covariance, self.rule, self.dtype, self.seed = covariance, rule, dtype, seed
        self.epoch = 0
        self._draws = 0  # backward passes so far; seeds the samples of the next
        self._blocks = make_blocks(self.heads, dtype, rule)
        self._exchange = Exchange(process_group)
        self._capture = Capture(shared_rep_hook, self.heads)
        self._exchange.group(None, self._capture.modules)  # sharding is visible before a forward
        self._staged: list[Statistics] = []  # evidence of backward passes without a step, by block
        self._batches = 0  # backward passes of this epoch that a step has used
        self._pending = False  # a backward pass was made that no step has used yet
        self._following = Following()
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
            targets: labels, where they cannot be recovered from the losses; same keys. In the
                shape of the head's output (``[N]`` will do for one output); of a multi-class head
                class indices ``[N]``, or probabilities ``[N, C]`` of floating dtype, which they
                must be for soft or smoothed labels. ``NaN`` (class index: -100) marks a missing
                label.

        Returns:
            The sum of the losses, detached.

        Raises:
            BayesAggError: a specific subclass for each kind of bad input, before any gradient,
                parameter or buffer has changed.
        """
        optimizer = self._following.optimizer
        if optimizer is not None:
            self._drop_skipped(optimizer)
        total = self._backward(losses, targets)
        if optimizer is None:
            self._commit()
        return total

    def follow(self, optimizer: Optimizer) -> None:
        """Count a batch once ``optimizer`` has taken its step, instead of at once.

        For a ``GradScaler``, which skips the step of a batch that overflowed, and for
        gradient accumulation beside it: evidence of backward passes that led to no step is dropped
        when the gradients are zeroed, and at the end of the epoch. A copied or unpickled engine
        follows no optimizer until it is told so.

        Args:
            optimizer: the one that steps the shared network.

        Raises:
            TypeError: if it is no ``torch.optim.Optimizer``.
        """
        self._following.start(optimizer, self)

    def _drop_skipped(self, optimizer: Optimizer) -> None:  # a step whose gradients are gone
        if self._pending and not has_gradients(optimizer):
            self._discard()

    def end_epoch(self) -> None:
        """Fold the epoch into the full-data posterior, the prior of the next epoch.

        From the end of pre-training on, heads with ``readout="posterior"`` receive its mean.
        An epoch without any step counts for nothing.
        """
        if self._following.optimizer is None:
            self._commit()
        self._discard()  # a backward pass whose step was skipped
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
        device = next(iter(self.heads.values())).linear.weight.device
        with torch.autocast(device.type, enabled=False):  # which the caller may be under
            return self._run(losses, targets, device)

    def _run(
        self,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
        device: torch.device,
    ) -> Tensor:
        group = self._exchange.group(self._capture.group, self._capture.modules)
        blocks = [] if self.epoch + 1 < self.pretrain_epochs else self._blocks  # of use now
        try:
            batch = read_batch(self._capture, self._blocks, losses, targets)
        except Exception:
            if group is not None:
                self._exchange.refuse(group, blocks, device)
            raise
        plan = make_plan(
            batch,
            blocks,
            self._exchange,
            group,
            pretraining=self.pretraining,
            scale=self.gradient_scale,
            full=self.covariance == "full",
            seed=self.seed + self._draws,
            max_data=self.max_data,
            rule=self.rule,
        )
        # All input is good and all is computed: only from here on does anything change.
        roots = [batch.total]
        if group is not None:  # every rank's gradients are waited for, also of absent tasks
            roots += [z for name, z in self._capture.outputs.items() if name not in batch.tasks]
        ones = [torch.ones_like(batch.total), *(torch.zeros_like(z) for z in roots[1:])]
        handle = None if plan.gradient is None else batch.h.register_hook(lambda _: plan.gradient)
        try:
            with self._capture.paused():
                torch.autograd.backward(roots, ones)
        finally:
            if handle is not None:
                handle.remove()
        self._adopt(plan)
        return batch.total.detach()

    def _adopt(self, plan: Plan) -> None:
        """After the backward pass: stage the evidence, keep the weights, spare the heads."""
        self._capture.clear()
        if self._staged and plan.evidence:  # gradient accumulation
            pairs = zip(self._staged, plan.evidence, strict=True)
            self._staged = [old.add_(new) for old, new in pairs]
        elif plan.evidence:
            self._staged = plan.evidence
        self._draws += 1
        self._pending = True
        self.task_weights.update(plan.weights)
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
            "rule": self.rule,
            "heads": describe(self.heads),
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
        return read_blocks(state, self.heads, self.dtype, self.rule)

    def _install(self, state: dict[str, Any], blocks: list[Block]) -> None:
        self._blocks = blocks
        self._discard()
        self.epoch, self._draws = state["epoch"], state["draws"]
        self._batches = state["batches"]
        self.task_weights = {name: w.clone() for name, w in state["task_weights"].items()}

    def extra_repr(self) -> str:
        """Settings and heads."""
        heads = ", ".join(f"{name}: {kind}" for name, kind in describe(self.heads))
        return (
            f"rule={self.rule!r}, covariance={self.covariance!r}, "
            f"gradient_scale={self.gradient_scale!r}, pretrain_epochs={self.pretrain_epochs}, "
            f"epoch={self.epoch}, heads={{{heads}}}"
        )


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        options = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")

"""The engine: losses in, one scalar out, whose backward pass carries the aggregate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesagg.arguments import check_arguments, device_of, passthrough_of, rule_of
from bayesagg.checkpoint import describe, read_state
from bayesagg.heads import Head, LossTask, named_heads
from bayesagg.invariance import on_step, warn_of_modes
from bayesagg.order import Order
from bayesagg.parallel import Exchange, ProcessGroup
from bayesagg.predicting import Predictor
from bayesagg.predicting.prediction import in_full_precision
from bayesagg.presets import check_rule
from bayesagg.reading import Batch, Reader
from bayesagg.reading.hooks import Call, Capture
from bayesagg.rules import Plan, Rule
from bayesagg.rules.base import uniform_weights
from bayesagg.scalar import Step

__all__ = ["BayesAgg", "Losses"]

Losses = Mapping[str, Tensor] | Sequence[Tensor]


class BayesAgg(nn.Module):
    """Bayesian gradient aggregation without an optimizer, for loops that own it.

    Called with losses it returns one scalar, to be used as their sum would be:
    ``engine(losses).backward()``. The watched modules are not registered as submodules.

    Args:
        shared_rep_hook: the last shared module, or ``None``. Heads are found without it; where
            ``fully_shard`` was applied to it and to no head, it shows the ranks.
        heads: heads by name, or a sequence of them (named ``"0"``, ``"1"``, …); a
            :class:`bayesagg.LossTask` is a loss without a head.
        rule: ``"likelihood"``: every task's gradient is that of its log-likelihood with a learned
            scale, under posteriors that follow the network. ``"paper"``: Eq. 2-11 of the paper. Or
            an object with settings, :class:`bayesagg.rules.LikelihoodRule` or
            :class:`bayesagg.rules.PaperRule`. It warns of settings that it does not use.
        steps_per_epoch: for ``PaperRule``: optimizer steps in an epoch, whose end turns the
            epoch's evidence into the full-data posterior. ``None``: its evidence fades.
        passthrough: names of losses without a head whose gradients arrive as they are.
        dtype: of the posterior algebra, ``torch.float64`` or ``torch.float32``.
        seed: of the samples of ``moments="monte_carlo"``, and of the subsets of ``max_data``.
        process_group: data-parallel ranks whose evidence is summed, so that all have one
            posterior. ``"auto"``: those over which gradients are averaged: the group of the
            ``DistributedDataParallel`` that ran the forward pass, or of ``fully_shard`` (applied
            before the engine is built); ranks that have neither are left alone. A
            ``torch.distributed`` group where gradients are averaged by other means; ``None``: none.

    Attributes:
        task_weights: mean weight per output of the last step, by task, ``[o]``, over this rank's
            data that have a label: what the gradient of each loss is multiplied by, as a share of
            the sum over all outputs. Uniform while training is linear scalarization.

    Raises:
        HeadError: for heads that are not linear, given twice, or do not suit the rule.
        ValueError: for an argument out of range.
        BayesAggError: for parameters on a mesh of several dimensions without ``process_group``.
    """

    def __init__(
        self,
        shared_rep_hook: nn.Module | None,
        heads: Mapping[str, Head | LossTask] | Sequence[Head | LossTask],
        *,
        rule: Literal["likelihood", "paper"] | Rule = "likelihood",
        steps_per_epoch: int | None = None,
        passthrough: Collection[str] = (),
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        super().__init__()
        check_arguments(shared_rep_hook, dtype, steps_per_epoch)
        self.tasks = named_heads(heads)
        self.heads = {name: head for name, head in self.tasks.items() if isinstance(head, Head)}
        self.rule, self.dtype, self.seed = rule_of(rule), dtype, seed
        self.steps_per_epoch = steps_per_epoch
        self.passthrough = passthrough_of(passthrough, self.tasks)
        check_rule(self.rule, self.tasks)
        self._memory = self.rule.start(self.tasks, dtype, seed, steps_per_epoch)
        keeping = [name for name, head in self.heads.items() if not self.rule.sets(head)]
        self._reader = Reader(self.tasks, self.passthrough, keeping)
        self._exchange = Exchange(process_group)
        self._capture = Capture(self.heads)
        modules: list[nn.Module] = [head.linear for head in self.heads.values()]
        # Not as an attribute, which would register it as a submodule.
        self._modules_of_ranks = (*modules, *([shared_rep_hook] if shared_rep_hook else []))
        self._exchange.start(None, self._modules_of_ranks)  # sharding shows before a forward pass
        self._order = Order(self.heads)
        self._optimizer_known = False
        self._weights = uniform_weights(self.tasks)
        self._weigh: Callable[[], Mapping[str, Tensor]] | None = None
        self._wait_for_optimizer()

    @property
    def task_weights(self) -> dict[str, Tensor]:
        """As above; worked out when somebody asks."""
        if self._weigh is not None:
            with torch.no_grad():
                found, self._weigh = self._weigh(), None
            like = next(iter(found.values()), None)
            dtype = None if like is None else like.dtype
            self._weights = {  # a task that took no part has no weight
                name: found[name] if name in found else torch.zeros_like(weight, dtype=dtype)
                for name, weight in self._weights.items()
            }
        return self._weights

    def forward(self, losses: Losses, targets: Losses | None = None) -> Tensor:
        """One scalar of the value of ``sum(losses)``, whose backward pass carries the aggregate.

        What arrives at every head's features is the aggregate, times whatever factor the scalar
        is given later (of a ``GradScaler``, or ``1 / n`` of an accumulation); all else receives
        its ordinary gradient. Evidence counts, and heads are set to their posterior means, once
        the backward pass has run, whether or not a step follows.

        Args:
            losses: one tensor per task that is present, by name or in the order of the tasks;
                reduced by mean or sum, or not at all (then their mean is taken). One that turns
                out not to be the likelihood of its head warns, once.
            targets: labels, where they cannot be recovered from the losses; same keys. In the
                shape of the head's output (``[N]`` will do for one output); of a multi-class head
                class indices ``[N]``, or probabilities ``[N, C]`` of floating dtype, which they
                must be for soft or smoothed labels. ``NaN`` (class index: -100) marks a missing
                label.

        Returns:
            a scalar with a graph.

        Raises:
            BayesAggError: a specific subclass for each kind of bad input, before any gradient,
                parameter or buffer has changed; in the backward pass if it is to be
                differentiated itself (``create_graph=True``).
        """
        return self._step(losses, targets).scalar()

    def _step(self, losses: Losses, targets: Losses | None) -> Step:
        """What the backward pass of some losses will do; nothing has changed yet."""
        device = device_of(self.heads, losses, self.dtype)
        self._exchange.start(self._capture.group, self._modules_of_ranks, bool(self.heads))
        with in_full_precision(device):
            try:
                batch = self._reader.read(self._capture, losses, targets)
                flags = self.rule.flags(self._memory, batch)
            except Exception:
                none = Batch([], torch.zeros((), device=device), {}, [], False)
                self._exchange.refuse(1 + len(self.rule.flags(self._memory, none)), device)
                raise
            overflowed, *flags = self._exchange.agree([batch.overflowed, *flags], device)
            known = self._reader.take()
            plan = Plan()
            if not overflowed:
                plan = self.rule.plan(self._memory, batch, flags, self._exchange)
                self._order.see(batch.parts)
            calls, watched = dict(self._capture.calls), self._capture.group is not None
            self._capture.clear()
            watched = watched or self._exchange.ranks is not None
            return Step(self._adopt, plan, batch, known, watched, self._waiting(batch, calls))

    def _waiting(self, batch: Batch, calls: Mapping[str, list[Call]]) -> list[Tensor]:
        """Outputs of absent tasks: every rank's gradients are waited for, also of these."""
        if self._exchange.ranks is None:
            return []
        absent = (name for name in calls if name not in batch.tasks)
        # Only the last call: those before may be of a batch that was refused.
        return [call.output for name in absent for call in calls[name][-1:]]

    def backward(self, losses: Losses, targets: Losses | None = None) -> Tensor:
        """As ``engine(losses, targets).backward()``.

        Returns:
            the sum of the losses, detached.

        Raises:
            BayesAggError: as of :meth:`forward`.
        """
        return self._step(losses, targets).backward()

    def end_epoch(self) -> None:
        """``PaperRule`` without ``steps_per_epoch`` only: the epoch becomes the posterior.

        Evidence since the last call is from now on the prior of the next epoch, and heads with
        ``readout="posterior"`` receive its mean. Under the default rule nothing happens.
        """
        self._write(self._memory.end_epoch())

    def stepped(self) -> None:
        """Tell the engine of an optimizer step; ``PaperRule`` with ``steps_per_epoch`` counts."""
        if weights := self._memory.stepped():
            self._write(weights)

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, rows in weights.items():
            self.heads[name].write(rows)

    def predictor(
        self, model: nn.Module, data: Iterable[Any] | None = None, **settings: Any
    ) -> Predictor:
        """Predictive distributions by the posteriors of the heads, as a module of its own.

        Args:
            model: the network that has the heads.
            data: pairs of inputs and targets by task: the posteriors are then exact, from one pass
                in evaluation mode. ``None``: they are those that training has left; weights that
                are far from what the evidence gives, as restored ones, warn.
            settings: with data, ``prior_variance`` (default: the rule's), ``passes`` and
                ``max_parameters`` of :meth:`bayesagg.predicting.Predictor.fit`.

        Raises:
            HeadError: if the model does not have the heads.
            PredictionError: without data, if a head has no evidence.
            ValueError: for settings without data, or out of range.
            BayesAggError: for bad data, as of :meth:`bayesagg.predicting.Predictor.fit`.
        """
        return Predictor.of_rule(model, self.tasks, self.rule, self._memory, data, **settings)

    def _adopt(self, plan: Plan, known: Mapping[str, Any] | None) -> None:
        """The backward pass has run: learn, keep the weights, set the heads; not if run again."""
        if known is not None:
            self._reader.known.update(known)
            if plan.update is not None:
                self._memory.commit(plan.update)
            if callable(plan.weights):
                self._weigh = plan.weights
            elif plan.weights:
                self._weigh = lambda found=plan.weights: found
            self._write(plan.heads)
        for name in plan.spared:
            for parameter in self.heads[name].parameters():
                parameter.grad = None  # the optimizer leaves these weights alone

    def _wait_for_optimizer(self) -> None:
        """Of an engine by itself: notice the first that takes a step of the heads."""
        mine = [p for head in self.heads.values() for p in head.linear.parameters()]
        on_step(self, mine, lambda this: not this._optimizer_known, BayesAgg._met_in_a_step)

    def _met_in_a_step(self, optimizer: Optimizer) -> None:
        warn_of_modes(optimizer)
        self._met(optimizer)

    def _met(self, optimizer: Optimizer) -> None:
        self._optimizer_known = True
        self._memory.met(optimizer)

    def get_extra_state(self) -> dict[str, Any]:
        """State for ``state_dict``: plain tensors, numbers and dicts."""
        return {
            "rule": self.rule.name,
            "heads": describe(self.tasks),
            "memory": self._memory.state_dict(),
            "reader": self._reader.state_dict(),
            "optimizer_known": self._optimizer_known,
            "task_weights": {name: w.clone() for name, w in self.task_weights.items()},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`get_extra_state`.

        Raises:
            CheckpointError: if the state was saved from other heads or under another rule, or is
                damaged; nothing has changed then.
        """
        self._install(self._checked(state))

    def _checked(self, state: Any) -> dict[str, Any]:
        """The parts of a checkpoint as they can be installed; nothing changes yet."""
        return read_state(state, self.tasks, self.rule.name, self._memory, self._reader)

    def _install(self, parts: Mapping[str, Any]) -> None:
        self._memory, self._reader = parts["memory"], parts["reader"]
        self._optimizer_known = parts["optimizer_known"]
        self._weights, self._weigh = dict(parts["task_weights"]), None

    def __getstate__(self) -> dict[str, Any]:
        assert self.task_weights  # what is left to work out cannot be pickled
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._wait_for_optimizer()

    def extra_repr(self) -> str:
        """Rule and heads."""
        heads = ", ".join(f"{name}: {kind}" for name, kind in describe(self.tasks))
        return f"rule={self.rule!r}, dtype={self.dtype}, heads=[{heads}]"

"""The optimizer wrapper: the two lines that a user changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesagg.arguments import check_step, warn_of_optimizer
from bayesagg.checkpoint import load_optimizer
from bayesagg.engine import BayesAgg, Losses
from bayesagg.errors import CheckpointError
from bayesagg.heads import Head, LossTask
from bayesagg.layers import check_private, unchanged
from bayesagg.parallel import ProcessGroup
from bayesagg.predicting import Predictor
from bayesagg.rules import Rule

__all__ = ["BayesAggWrapper"]

_KEY = "bayesagg"


class BayesAggWrapper(Optimizer):
    """Wrap an optimizer; call ``step(losses)`` in place of ``sum(losses).backward(); step()``.

    Example::

        optimizer = BayesAggWrapper(
            torch.optim.Adam(model.parameters(), lr=1e-3),
            shared_rep_hook=model.backbone,
            heads={"age": RegressionHead(model.age), "gender": BinaryHead(model.gender)},
        )
        ...
        optimizer.zero_grad()
        optimizer.step(losses)

    Args:
        optimizer: any ``torch.optim.Optimizer``; it owns all parameters, those of the heads too,
            and a warning names heads that it lacks.
        shared_rep_hook: the last shared module, or ``None``; this and the following are those of
            :class:`bayesagg.BayesAgg`, which says more.
        heads: heads by name, or a sequence of them (named ``"0"``, ``"1"``, …).
        rule: ``"likelihood"`` or ``"paper"``, or a rule object with settings.
        steps_per_epoch: for ``PaperRule``: optimizer steps in an epoch, counted without
            accumulated micro-batches.
        passthrough: names of losses without a head whose gradients arrive as they are.
        dtype: of the posterior algebra.
        seed: of samples and subsets.
        process_group: data-parallel ranks whose evidence is summed.

    Attributes:
        base_optimizer: the wrapped optimizer.
        engine: the :class:`bayesagg.BayesAgg` that does the work.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, or already wrapped.
        BayesAggError: as of :class:`bayesagg.BayesAgg`.
        ValueError: for an argument out of range.
    """

    base_optimizer: Optimizer
    engine: BayesAgg

    def __init__(
        self,
        optimizer: Optimizer,
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
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, BayesAggWrapper):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer that is not wrapped yet, got "
                f"{type(optimizer).__name__}."
            )
        owned = (p for group in optimizer.param_groups for p in group["params"])
        check_private(owned, "`optimizer`")
        engine = BayesAgg(
            shared_rep_hook,
            heads,
            rule=rule,
            steps_per_epoch=steps_per_epoch,
            passthrough=passthrough,
            dtype=dtype,
            seed=seed,
            process_group=process_group,
        )
        engine._met(optimizer)
        warn_of_optimizer(optimizer, engine.heads, engine.rule)
        self._assemble(optimizer, engine)

    def _assemble(self, optimizer: Optimizer, engine: BayesAgg) -> None:
        self.base_optimizer, self.engine = optimizer, engine
        # Optimizer.__init__ sets up step hooks and profiling, but would also assign state,
        # defaults and groups, which here are those of the base optimizer: see the setters.
        self._constructing = True
        super().__init__(optimizer.param_groups, self.defaults)
        self._constructing = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the wrapped optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self._constructing:
            self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """That of the wrapped optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        if not self._constructing:
            self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of the wrapped optimizer; some that have another inside have none."""
        return getattr(self.base_optimizer, "defaults", {})

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if not self._constructing:
            self.base_optimizer.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the wrapped optimizer."""
        if not self._constructing:
            self.base_optimizer.add_param_group(param_group)

    @property
    def task_weights(self) -> dict[str, Tensor]:
        """Mean weight per output of the last step, by task, ``[o]``; their sum is one."""
        return self.engine.task_weights

    def loss(self, losses: Losses, targets: Losses | None = None) -> Tensor:
        """One scalar of the value of ``sum(losses)``; see :meth:`bayesagg.BayesAgg.forward`.

        Args:
            losses: one tensor per task that is present, by name or in the order of the heads.
            targets: labels, where they cannot be recovered from the losses; same keys.

        Returns:
            a scalar with a graph; its backward pass carries the aggregate.

        Raises:
            BayesAggError: as of :meth:`bayesagg.BayesAgg.forward`.
        """
        scalar: Tensor = self.engine(losses, targets)
        return scalar

    def backward(self, losses: Losses, targets: Losses | None = None) -> Tensor:
        """``loss(losses, targets).backward()``; returns the sum of the losses, detached.

        Raises:
            BayesAggError: as of :meth:`bayesagg.BayesAgg.forward`, before anything has changed.
        """
        return self.engine.backward(losses, targets)

    def step(  # type: ignore[override]
        self,
        losses: Losses | Callable[[], Any] | None = None,
        *,
        targets: Losses | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """:meth:`backward` and the wrapped step; without losses, the wrapped step alone.

        Args:
            losses: as of :meth:`loss`; a callable in first place is a closure.
            targets: as of :meth:`loss`.
            closure: re-evaluates the model and calls :meth:`backward`; returns the loss.

        Returns:
            The sum of the losses, detached, or what the wrapped ``step`` returns.

        Raises:
            BayesAggError: as of :meth:`loss`.
            TypeError: for losses and a closure at once, targets without losses, or losses where
                the wrapped optimizer needs a closure.
        """
        check_step(self.base_optimizer, losses, targets, closure)
        if callable(losses):
            losses, closure = None, losses
        result: Any = None
        if losses is not None:
            result = self.backward(losses, targets)
        if closure is None:
            stepped = self.base_optimizer.step()
        else:
            stepped = self.base_optimizer.step(closure)
        self.engine.stepped()
        return stepped if result is None else result

    def predictor(
        self, model: nn.Module, data: Iterable[Any] | None = None, **settings: Any
    ) -> Predictor:
        """Predictive distributions of every task: :meth:`bayesagg.BayesAgg.predictor`.

        Args:
            model: the network that has the heads.
            data: for exact posteriors, pairs of inputs and targets by task, such as the training
                loader; ``None``: those of training.
            settings: as there.

        Raises:
            BayesAggError: as there.
            ValueError: as there.
        """
        return self.engine.predictor(model, data, **settings)

    def end_epoch(self) -> None:
        """Of ``PaperRule`` without ``steps_per_epoch``: see :meth:`bayesagg.BayesAgg.end_epoch`."""
        self.engine.end_epoch()

    def train(self) -> None:
        """Of a wrapped optimizer that has it, as schedule-free ones do; of others nothing.

        These keep weights for training and others for evaluation. Heads that a posterior sets have
        one for both, the posterior mean.
        """
        self._turn("train")

    def eval(self) -> None:
        """As :meth:`train`: to the weights for evaluation."""
        self._turn("eval")

    def _turn(self, mode: str) -> None:
        turn, engine = getattr(self.base_optimizer, mode, None), self.engine
        if callable(turn):
            spared = [engine.heads[name] for name in engine.rule.spared(engine._memory)]
            with unchanged(p for head in spared for p in head.parameters()):
                turn()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped optimizer, and the posterior under ``"bayesagg"``."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = {**self.base_optimizer.state_dict(), _KEY: self.engine.get_extra_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: if the state was not saved by a wrapper, or from other heads, or is
                damaged in any part; nothing has changed then.
        """
        if not isinstance(state_dict, dict):
            raise CheckpointError(
                f"the checkpoint is a {type(state_dict).__name__}: pass what state_dict() returned."
            )
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        if _KEY not in state_dict:
            raise CheckpointError(
                "the state was saved by a plain optimizer: load it with "
                "`wrapper.base_optimizer.load_state_dict(state)`; the posterior then starts anew. "
                "Where torch.distributed.checkpoint took the state apart, pass it "
                "`wrapper.base_optimizer`, and a bayesagg.checkpoint.PosteriorState beside it."
            )
        own = self.engine._checked(state_dict[_KEY])  # before anything is loaded
        base = {key: value for key, value in state_dict.items() if key != _KEY}
        load_optimizer(self.base_optimizer, base)
        self.engine._install(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.base_optimizer, "engine": self.engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._assemble(**state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n{self.base_optimizer}\n{self.engine}\n)"

"""The wrapper: any optimizer, with ``step(losses)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesagg.aggregation import GradientScale
from bayesagg.distributed import ProcessGroup
from bayesagg.engine import BayesAgg
from bayesagg.errors import CheckpointError
from bayesagg.heads import Head
from bayesagg.likelihoods import Block, Rule

__all__ = ["BayesAggWrapper"]

_KEY = "bayesagg"
_LONG = 10_000  # steps after which an epoch that nobody ends is worth a warning

Losses = Mapping[str, Tensor] | Sequence[Tensor]


class BayesAggWrapper(Optimizer):
    """Wrap an optimizer; call ``step(losses)`` in place of ``sum(losses).backward(); step()``.

    Example::

        optimizer = BayesAggWrapper(
            torch.optim.Adam(model.parameters(), lr=1e-3),
            shared_rep_hook=model.backbone,
            heads={"age": RegressionHead(model.age), "gender": BinaryHead(model.gender)},
            steps_per_epoch=len(train_loader),
        )
        ...
        optimizer.zero_grad()
        optimizer.step(losses)

    Args:
        optimizer: any ``torch.optim.Optimizer``; it owns all parameters, those of the heads too.
        shared_rep_hook: the last shared module, whose output is the representation h that all
            heads receive; ``None``: h is what the heads receive.
        heads: task heads by name, or a sequence of them (named ``"0"``, ``"1"``, …).
        steps_per_epoch: optimizer steps in an epoch, counted without accumulated micro-batches;
            ``None``: call :meth:`end_epoch` after every epoch yourself. Without either, training
            stays in its first epoch, that of linear scalarization; after 10,000 steps it warns.
        pretrain_epochs: epochs of linear scalarization first.
        gradient_scale: ``"sum"``, K times Eq. 7, or ``"mean"``, Eq. 7 as printed; this and the
            following are those of :class:`bayesagg.BayesAgg`, which says more.
        covariance: ``"diagonal"`` (Eq. 7), or ``"full"`` (Eq. 6, with ``rule="paper"``).
        rule: ``"likelihood"``: gradients of log-likelihoods of learned scale; or ``"paper"``.
        dtype: of the posterior algebra.
        seed: of samples and subsets.
        max_data: posterior and moments from at most this many data per step; for dense heads.
        process_group: data-parallel ranks whose evidence is summed.

    Attributes:
        base_optimizer: the wrapped optimizer.
        engine: the :class:`bayesagg.BayesAgg` that does the work.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, or already wrapped.
        HeadError: as of :class:`bayesagg.BayesAgg`.
        ValueError: for an argument out of range.
    """

    base_optimizer: Optimizer
    engine: BayesAgg

    def __init__(
        self,
        optimizer: Optimizer,
        shared_rep_hook: nn.Module | None,
        heads: Mapping[str, Head] | Sequence[Head],
        *,
        steps_per_epoch: int | None = None,
        pretrain_epochs: int = 1,
        gradient_scale: GradientScale = "sum",
        covariance: Literal["diagonal", "full"] = "diagonal",
        rule: Rule = "likelihood",
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        max_data: int | None = None,
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, BayesAggWrapper):
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer that is not wrapped yet, got "
                f"{type(optimizer).__name__}."
            )
        if steps_per_epoch is not None and (
            isinstance(steps_per_epoch, bool)
            or not isinstance(steps_per_epoch, int)
            or steps_per_epoch < 1
        ):
            raise ValueError(
                f"steps_per_epoch must be a positive integer, such as len(train_loader), or None "
                f"to call end_epoch() yourself; got {steps_per_epoch!r}."
            )
        engine = BayesAgg(
            shared_rep_hook,
            heads,
            pretrain_epochs=pretrain_epochs,
            gradient_scale=gradient_scale,
            covariance=covariance,
            rule=rule,
            dtype=dtype,
            seed=seed,
            max_data=max_data,
            process_group=process_group,
        )
        self._assemble(optimizer, engine, steps_per_epoch, 0)

    def _assemble(
        self, optimizer: Optimizer, engine: BayesAgg, steps_per_epoch: int | None, steps: int
    ) -> None:
        self.base_optimizer, self.engine = optimizer, engine
        self.steps_per_epoch, self._steps = steps_per_epoch, steps
        # Optimizer.__init__ sets up step hooks and profiling, but would also assign state,
        # defaults and groups, which here are those of the base optimizer: see the setters.
        self._constructing = True
        super().__init__(optimizer.param_groups, optimizer.defaults)
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
        """Those of the wrapped optimizer."""
        return self.base_optimizer.defaults

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
        """Mean weight α per output of the last step, by task, ``[o]``; their sum is one."""
        return self.engine.task_weights

    def backward(self, losses: Losses, targets: Losses | None = None) -> Tensor:
        """Fill every ``.grad``; see :meth:`bayesagg.BayesAgg.backward`.

        The batch counts for the posterior once :meth:`step` has been taken; :meth:`zero_grad`
        drops it, so a step that a ``GradScaler`` skips leaves the posterior untouched.

        Args:
            losses: one tensor per task that is present, by name or in the order of the heads.
            targets: labels, where they cannot be recovered from the losses; same keys.

        Returns:
            The sum of the losses, detached.

        Raises:
            BayesAggError: as of :meth:`bayesagg.BayesAgg.backward`, before anything has changed.
        """
        self.engine._drop_skipped(self.base_optimizer)  # the model's own zero_grad was called
        return self.engine._backward(losses, targets)

    def step(  # type: ignore[override]
        self,
        losses: Losses | Callable[[], Any] | None = None,
        *,
        targets: Losses | None = None,
        closure: Callable[[], Any] | None = None,
    ) -> Any:
        """:meth:`backward` and the wrapped step; without losses, the wrapped step alone.

        A step counts for the epoch only where :meth:`backward` led to it: after the losses' own
        ``backward()`` it is a step of linear scalarization, of which nothing is learned.

        Args:
            losses: as of :meth:`backward`; a callable in first place is a closure.
            targets: as of :meth:`backward`.
            closure: re-evaluates the model and calls :meth:`backward`; returns the loss.

        Returns:
            The sum of the losses, detached, or what the wrapped ``step`` returns.

        Raises:
            BayesAggError: as of :meth:`backward`.
            TypeError: for losses and a closure at once, or targets without losses.
        """
        if callable(losses):
            if closure is not None:
                raise TypeError("step() got two closures: pass one, and losses inside of it.")
            losses, closure = None, losses
        if losses is not None and closure is not None:
            raise TypeError("step() takes losses or a closure, not both.")
        if losses is None and targets is not None:
            raise TypeError("step() got targets without losses: pass both, or neither.")
        result: Any = None
        if losses is not None:
            result = self.backward(losses, targets)
        if closure is None:
            stepped = self.base_optimizer.step()
        else:
            stepped = self.base_optimizer.step(closure)
        self._count_step()
        return stepped if result is None else result

    def _count_step(self) -> None:
        """A step counts where a backward pass led to it, not where the state is initialised."""
        if not self.engine._pending:
            return
        self.engine._commit()
        self._steps += 1
        if self._steps == self.steps_per_epoch:
            self.end_epoch()
        elif self._steps == _LONG and self.steps_per_epoch is None and self.engine.pretraining:
            warnings.warn(
                f"{_LONG} steps, and the first epoch has not ended: training is still linear "
                f"scalarization. Give steps_per_epoch, or call end_epoch() after every epoch.",
                stacklevel=4,  # of the caller of step(), which torch wraps
            )

    def end_epoch(self) -> None:
        """Fold the epoch into the full-data posterior; see :meth:`bayesagg.BayesAgg.end_epoch`."""
        self._steps = 0
        self.engine._discard()  # a backward pass whose step was skipped
        self.engine.end_epoch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer; evidence of a backward pass without a step is dropped."""
        self.engine._discard()
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped optimizer, and the posterior under ``"bayesagg"``."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = {**self.base_optimizer.state_dict(), _KEY: self._own_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: if the state was not saved by a wrapper, or from other heads.
        """
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
        own = state_dict[_KEY]
        blocks = self._read_own_state(own)  # checked before anything is loaded
        base = {key: value for key, value in state_dict.items() if key != _KEY}
        self.base_optimizer.load_state_dict(base)
        self._install(own, blocks)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _own_state(self) -> dict[str, Any]:
        """All but that of the wrapped optimizer."""
        return {"engine": self.engine.get_extra_state(), "steps": self._steps}

    def _read_own_state(self, own: Any) -> list[Block]:
        if not isinstance(own, dict) or own.keys() != {"engine", "steps"}:
            raise CheckpointError(
                f"the checkpoint's entry {_KEY!r} is incomplete, or of another version. Save and "
                f"load the whole `state_dict()`."
            )
        return self.engine._read_blocks(own["engine"])

    def _install(self, own: dict[str, Any], blocks: list[Block]) -> None:
        self.engine._install(own["engine"], blocks)
        self._steps = own["steps"]

    def _load_own_state(self, own: dict[str, Any]) -> None:
        self._install(own, self._read_own_state(own))

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.base_optimizer,
            "engine": self.engine,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self._steps,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._assemble(**state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n{self.base_optimizer}\n{self.engine}\n)"

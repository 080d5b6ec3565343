"""A callback for Lightning; ``pip install lightning`` (or ``pytorch-lightning``) first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayesagg.engine import BayesAgg
from bayesagg.logging import task_weight_scalars

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            Callback = None

__all__ = ["TaskWeightsCallback"]


class TaskWeightsCallback(Callback if Callback is not None else object):  # type: ignore[misc]
    """Log the task weights to every logger of the trainer.

    Args:
        engine: whose weights; ``None``: that of the module that is trained, which must have
            exactly one among its submodules.
        every_n_steps: optimizer steps between entries; ``None``: ``log_every_n_steps`` of the
            trainer.
        prefix: of every name, see :func:`bayesagg.logging.task_weight_scalars`.

    Raises:
        ImportError: if Lightning is not installed.
        ValueError: if ``every_n_steps`` is not positive, or, when training starts, if the module
            does not have exactly one engine.
    """

    def __init__(
        self,
        engine: BayesAgg | None = None,
        *,
        every_n_steps: int | None = None,
        prefix: str = "task_weights/",
    ) -> None:
        if Callback is None:
            raise ImportError(
                "TaskWeightsCallback needs Lightning: pip install lightning. Without it, "
                "bayesagg.logging.log_task_weights writes to TensorBoard."
            )
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be positive or None, got {every_n_steps!r}.")
        super().__init__()
        self.every_n_steps, self.prefix = every_n_steps, prefix
        self._given, self._engine = engine, engine
        self._last = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the engine."""
        self._last = trainer.global_step
        if self._given is not None:
            return
        engines = [module for module in pl_module.modules() if isinstance(module, BayesAgg)]
        if len(engines) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} has {len(engines)} BayesAgg engines among its "
                f"submodules: pass TaskWeightsCallback the one to log."
            )
        self._engine = engines[0]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the module's engine."""
        self._engine = self._given

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, where a step is due."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if self._engine is None or step == self._last or every == 0 or step % every != 0:
            return
        self._last = step
        metrics = task_weight_scalars(self._engine, self.prefix)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

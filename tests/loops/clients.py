"""The loops of other packages over the same batches, each as its users write it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayesagg import BayesAggWrapper
from tests.helpers.data import make_batch, make_losses
from tests.helpers.states import assert_finite, snapshot

Batch = Mapping[str, Tensor]
LossesOf = Callable[[nn.Module, Batch], dict[str, Tensor]]


def batches_of(count: int) -> list[Batch]:
    """Mappings as the loops take them; the inputs are ``"x"``."""
    return [{"x": x, **labels} for x, labels in (make_batch(seed=i) for i in range(count))]


def losses_of(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of one of them."""
    return make_losses(net(batch["x"]), batch)


def state_of(net: nn.Module, wrapper: BayesAggWrapper) -> dict[str, Any]:
    """What has to agree. Some loops clear the gradients behind a step, others before it."""
    state = wrapper.state_dict()
    found = {"engine": state["bayesagg"], "base": state["state"], **snapshot(net)}
    assert_finite({"state": state, **found})
    return {key: found[key] for key in ("engine", "base", "parameters", "buffers")}


def in_order(batches: Sequence[Batch]) -> DataLoader:
    """One item is one batch: batches of one that are taken out of their list again."""
    return DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0])


def plain(
    net: nn.Module,
    wrapper: BayesAggWrapper,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
) -> None:
    """The loop that the others have to equal."""
    for _ in range(epochs):
        for batch in batches:
            losses = losses_of(net, batch)
            wrapper.zero_grad()
            wrapper.step(losses)


def huggingface(
    net: nn.Module,
    wrapper: BayesAggWrapper,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
    resume: Path | None = None,
    **arguments: Any,
) -> Any:
    """``transformers.Trainer`` with ``compute_loss``; the wrapper is its optimizer."""
    transformers = pytest.importorskip("transformers")

    class MultiTaskTrainer(transformers.Trainer):
        loss_is_scaled_for_ga = False  # whatever else is counted in a batch: divide it

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return wrapper.loss(losses_of(model, inputs))

        def get_train_dataloader(self):
            return self.accelerator.prepare(in_order(batches))

    settings = {
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        **arguments,
    }
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        disable_tqdm=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        **settings,
    )
    trainer = MultiTaskTrainer(model=net, args=args, optimizers=(wrapper, None))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def lightning(
    net: nn.Module,
    wrapper: BayesAggWrapper,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
    resume: Path | None = None,
    **arguments: Any,
) -> Any:
    """Automatic optimization; the wrapper is what ``configure_optimizers`` returns."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def configure_optimizers(self):
            return wrapper

        def training_step(self, batch, batch_idx):
            return wrapper.loss(losses_of(self.net, batch))

    return fit(Module(), in_order(batches), folder, epochs, resume, **arguments)


def fit(
    module: Any,
    loader: DataLoader,
    folder: Path,
    epochs: int,
    resume: Path | str | None = None,
    **arguments: Any,
) -> Any:
    """Lightning's Trainer, which has run."""
    pl = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"logger": False, "enable_checkpointing": False, **arguments},
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def accelerate(
    net: nn.Module,
    wrapper: BayesAggWrapper,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
) -> Any:
    """``accelerator.backward`` of the scalar; the wrapper is prepared as any optimizer."""
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(net, wrapper, in_order(batches))
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(wrapper.loss(losses_of(model, batch)))
            optimizer.step()
    return accelerator


CLIENTS = {"huggingface": huggingface, "lightning": lightning, "accelerate": accelerate}

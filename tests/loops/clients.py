"""The loops of other packages over the same batches, each as its users write it.

A loop takes the network, its owner (a wrapper, or an engine beside an optimizer), batches and what
makes losses of one. ``save`` is a number of steps after which there is to be a checkpoint, whose
path is returned; ``resume`` such a path.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayesagg import BayesAgg, BayesAggWrapper
from tests.helpers.data import make_batch, make_losses
from tests.helpers.states import assert_finite, snapshot

Batch = Mapping[str, Tensor]
LossesOf = Callable[[nn.Module, Batch], dict[str, Tensor]]
Owner = BayesAgg | BayesAggWrapper


def batches_of(count: int) -> list[Batch]:
    """Mappings as the loops take them; the inputs are ``"x"``."""
    return [{"x": x, **labels} for x, labels in (make_batch(seed=i) for i in range(count))]


def losses_of(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of one of them."""
    return make_losses(net(batch["x"]), batch)


def scalar_of(owner: Owner, losses: dict[str, Tensor]) -> Tensor:
    """What is differentiated."""
    return owner(losses) if isinstance(owner, BayesAgg) else owner.loss(losses)


def state_of(
    net: nn.Module, owner: Owner, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """What has to agree. Some loops clear the gradients behind a step, others before it."""
    if isinstance(owner, BayesAgg):
        state = {"engine": owner.get_extra_state(), "base": optimizer.state_dict()["state"]}
    else:
        saved = owner.state_dict()
        state = {"engine": saved["bayesagg"], "base": saved["state"]}
    found = {**state, **snapshot(net)}
    assert_finite(found)
    return {key: found[key] for key in ("engine", "base", "parameters", "buffers")}


def in_order(batches: Sequence[Batch]) -> DataLoader:
    """One item is one batch: batches of one that are taken out of their list again."""
    return DataLoader(batches, batch_size=1, collate_fn=lambda items: items[0])


def plain(
    net: nn.Module,
    owner: Owner,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path | None = None,
    epochs: int = 1,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    clip: float | None = None,
) -> None:
    """The loop that the others have to equal.

    The last step of an epoch has what batches are left, and divides by their number.
    """
    optimizer = owner if optimizer is None else optimizer
    for _ in range(epochs):
        for first in range(0, len(batches), accumulate):
            some = batches[first : first + accumulate]
            optimizer.zero_grad()
            if accumulate == 1 and optimizer is owner:
                owner.step(losses_of(net, some[0]))
                continue
            for batch in some:
                (scalar_of(owner, losses_of(net, batch)) / len(some)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
        if isinstance(owner, BayesAgg):
            owner.end_epoch()


def huggingface(
    net: nn.Module,
    owner: BayesAggWrapper,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
    *,
    accumulate: int = 1,
    clip: float = 0.0,
    save: int | None = None,
    resume: Path | None = None,
    **arguments: Any,
) -> Path:
    """``transformers.Trainer`` with ``compute_loss``; the wrapper is its optimizer."""
    transformers = pytest.importorskip("transformers")

    class MultiTaskTrainer(transformers.Trainer):
        loss_is_scaled_for_ga = False  # whatever else is counted in a batch: divide it

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return owner.loss(losses_of(model, inputs))

        def get_train_dataloader(self):
            return self.accelerator.prepare(in_order(batches))

    saving = {"save_strategy": "no"} if save is None else {"save_strategy": "steps"}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        disable_tqdm=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulate,
        save_steps=save or 1,
        **saving,
        **arguments,
    )
    trainer = MultiTaskTrainer(model=net, args=args, optimizers=(owner, None))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert hasattr(trainer.model_wrapped, "_orig_mod") == args.torch_compile
    return folder / f"checkpoint-{save}"


def module_of(
    net: nn.Module,
    owner: Owner,
    losses_of: LossesOf,
    optimizer: torch.optim.Optimizer | None = None,
    manual: bool = False,
) -> Any:
    """A LightningModule; an engine is saved with it, and told of the ends of epochs."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.owner = net, owner
            self.automatic_optimization = not manual

        def configure_optimizers(self):
            return owner if optimizer is None else optimizer

        def training_step(self, batch, batch_idx):
            scalar = scalar_of(owner, losses_of(net, batch))
            if not manual:
                return scalar
            self.optimizers().zero_grad()
            self.manual_backward(scalar)
            self.optimizers().step()

        def on_train_epoch_end(self):
            if isinstance(owner, BayesAgg):
                owner.end_epoch()

    return Module()


def fit(
    module: Any,
    loader: DataLoader,
    folder: Path,
    epochs: int,
    resume: Path | None = None,
    **arguments: Any,
) -> None:
    """Lightning's Trainer."""
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


def lightning(
    net: nn.Module,
    owner: Owner,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    manual: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    save: int | None = None,
    **arguments: Any,
) -> Path:
    """Automatic optimization, or manual; a wrapper is what ``configure_optimizers`` returns."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if save is not None:
        kept = callbacks.ModelCheckpoint(folder, save_last=True)
        arguments |= {"enable_checkpointing": True, "callbacks": [kept]}
    module = module_of(net, owner, losses_of, optimizer, manual)
    if not manual:
        arguments |= {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    fit(module, in_order(batches), folder, epochs, **arguments)
    return folder / "last.ckpt"


class Registered:
    """``save_state`` and ``load_state`` of an engine want these two names."""

    def __init__(self, engine: BayesAgg) -> None:
        self.state_dict, self.load_state_dict = engine.get_extra_state, engine.set_extra_state


def accelerate(
    net: nn.Module,
    owner: Owner,
    batches: Sequence[Batch],
    losses_of: LossesOf,
    folder: Path,
    epochs: int = 1,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    save: int | None = None,
    resume: Path | None = None,
) -> Path:
    """``accelerator.backward`` of the scalar; the wrapper is prepared as any optimizer."""
    package = pytest.importorskip("accelerate")
    accelerator = package.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    prepared = accelerator.prepare(net, optimizer or owner, in_order(batches))
    model, optimizer, loader = prepared
    if isinstance(owner, BayesAgg):
        accelerator.register_for_checkpointing(Registered(owner))
    if resume is not None:
        accelerator.load_state(str(resume))
        epochs -= 1 + int(resume.name)  # the number of its last epoch
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(scalar_of(owner, losses_of(model, batch)))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        if isinstance(owner, BayesAgg):
            owner.end_epoch()
    path = folder / str(epochs - 1)
    if save is not None:
        accelerator.save_state(str(path))
    return path


CLIENTS = {"huggingface": huggingface, "lightning": lightning, "accelerate": accelerate}

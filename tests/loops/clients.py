"""The loops of other packages over the same batches, each as its users write it.

Those that save a checkpoint return its path.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass
class Job:
    """What a loop is given.

    Attributes:
        net: the network.
        owner: a wrapper, or an engine beside an optimizer.
        batches: of an epoch.
        losses_of: what makes losses of one.
        folder: for files.
        epochs: in all, those before a checkpoint included.
        optimizer: an engine's; that of a wrapper is itself.
        accumulate: batches of a step.
        clip: norm of the gradients.
        save: steps after which there is to be a checkpoint.
        resume: the path of one.
    """

    net: nn.Module
    owner: Owner
    batches: Sequence[Batch]
    losses_of: LossesOf
    folder: Path | None = None
    epochs: int = 1
    optimizer: torch.optim.Optimizer | None = None
    accumulate: int = 1
    clip: float | None = None
    save: int | None = None
    resume: Path | None = None

    def __post_init__(self) -> None:
        self.optimizer = self.owner if self.optimizer is None else self.optimizer

    def scalar(self, net: nn.Module, batch: Batch) -> Tensor:
        """What is differentiated."""
        losses = self.losses_of(net, batch)
        return self.owner(losses) if self.has_engine else self.owner.loss(losses)

    @property
    def has_engine(self) -> bool:
        """Whether ends of epochs are to be told."""
        return isinstance(self.owner, BayesAgg)

    def loader(self) -> DataLoader:
        """One item is one batch: batches of one that are taken out of their list again."""
        return DataLoader(self.batches, batch_size=1, collate_fn=lambda items: items[0])


def batches_of(count: int) -> list[Batch]:
    """Mappings as the loops take them; the inputs are ``"x"``."""
    return [{"x": x, **labels} for x, labels in (make_batch(seed=i) for i in range(count))]


def losses_of(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of one of them."""
    return make_losses(net(batch["x"]), batch)


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


def plain(job: Job) -> None:
    """The loop that the others have to equal.

    The last step of an epoch has what batches are left, and divides by their number.
    """
    for _ in range(job.epochs):
        for first in range(0, len(job.batches), job.accumulate):
            some = job.batches[first : first + job.accumulate]
            job.optimizer.zero_grad()
            if job.accumulate == 1 and not job.has_engine:
                job.owner.step(job.losses_of(job.net, some[0]))
                continue
            for batch in some:
                (job.scalar(job.net, batch) / len(some)).backward()
            if job.clip is not None:
                nn.utils.clip_grad_norm_(job.net.parameters(), job.clip)
            job.optimizer.step()
        if job.has_engine:
            job.owner.end_epoch()


def huggingface(job: Job, **arguments: Any) -> Path:
    """``transformers.Trainer`` with ``compute_loss``; the wrapper is its optimizer."""
    transformers = pytest.importorskip("transformers")

    class MultiTaskTrainer(transformers.Trainer):
        loss_is_scaled_for_ga = False  # whatever else is counted in a batch: divide it

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return job.scalar(model, inputs)

        def get_train_dataloader(self):
            return self.accelerator.prepare(job.loader())

    args = transformers.TrainingArguments(
        output_dir=str(job.folder),
        num_train_epochs=job.epochs,
        disable_tqdm=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        max_grad_norm=job.clip or 0.0,
        gradient_accumulation_steps=job.accumulate,
        save_strategy="no" if job.save is None else "steps",
        save_steps=job.save or 1,
        **arguments,
    )
    trainer = MultiTaskTrainer(model=job.net, args=args, optimizers=(job.owner, None))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if job.resume is None else str(job.resume))
    assert hasattr(trainer.model_wrapped, "_orig_mod") == args.torch_compile
    return job.folder / f"checkpoint-{job.save}"


def module_of(job: Job, manual: bool = False) -> Any:
    """A LightningModule; an engine is saved with it, and told of the ends of epochs."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.owner = job.net, job.owner
            self.automatic_optimization = not manual

        def configure_optimizers(self):
            return job.optimizer

        def training_step(self, batch, batch_idx):
            scalar = job.scalar(job.net, batch)
            if not manual:
                return scalar
            self.optimizers().zero_grad()
            self.manual_backward(scalar)
            self.optimizers().step()

        def on_train_epoch_end(self):
            if job.has_engine:
                job.owner.end_epoch()

    return Module()


def lightning(job: Job, manual: bool = False, **arguments: Any) -> Path:
    """Automatic optimization, or manual; a wrapper is what ``configure_optimizers`` returns."""
    pl = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    arguments = {"logger": False, "enable_checkpointing": job.save is not None, **arguments}
    if job.save is not None:
        arguments["callbacks"] = [pl.callbacks.ModelCheckpoint(job.folder, save_last=True)]
    if not manual:
        arguments |= {"accumulate_grad_batches": job.accumulate, "gradient_clip_val": job.clip}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=job.epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job.folder,
        **arguments,
    )
    trainer.fit(module_of(job, manual), job.loader(), ckpt_path=job.resume)
    return job.folder / "last.ckpt"


class Registered:
    """``save_state`` and ``load_state`` of an engine want these two names."""

    def __init__(self, engine: BayesAgg) -> None:
        self.state_dict, self.load_state_dict = engine.get_extra_state, engine.set_extra_state


def accelerate(job: Job) -> Path:
    """``accelerator.backward`` of the scalar; the wrapper is prepared as any optimizer."""
    package = pytest.importorskip("accelerate")
    accelerator = package.Accelerator(cpu=True, gradient_accumulation_steps=job.accumulate)
    model, optimizer, loader = accelerator.prepare(job.net, job.optimizer, job.loader())
    if job.has_engine:
        accelerator.register_for_checkpointing(Registered(job.owner))
    done = 0
    if job.resume is not None:
        accelerator.load_state(str(job.resume))
        done = int(job.resume.name)  # the number of epochs before it
    for _ in range(done, job.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(job.scalar(model, batch))
                if job.clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(job.net.parameters(), job.clip)
                optimizer.step()
                optimizer.zero_grad()
        if job.has_engine:
            job.owner.end_epoch()
    path = job.folder / str(job.epochs)
    if job.save is not None:
        accelerator.save_state(str(path))
    return path


def fabric(job: Job, **arguments: Any) -> Path:
    """Lightning's Fabric, which has ``backward`` and a checkpoint of what it is given."""
    package = pytest.importorskip("lightning.fabric")
    launcher = package.Fabric(accelerator="cpu", devices=1, **arguments)
    model, optimizer = launcher.setup(job.net, job.optimizer)
    loader = launcher.setup_dataloaders(job.loader())
    state = {"model": model, "optimizer": optimizer, "epoch": 0}
    if job.has_engine:
        state["engine"] = Registered(job.owner)
    if job.resume is not None:
        launcher.load(str(job.resume), state)
    for epoch in range(state["epoch"], job.epochs):
        for index, batch in enumerate(loader):
            launcher.backward(job.scalar(model, batch) / job.accumulate)
            if (index + 1) % job.accumulate == 0:
                if job.clip is not None:
                    launcher.clip_gradients(model, optimizer, max_norm=job.clip)
                optimizer.step()
                optimizer.zero_grad()
        if job.has_engine:
            job.owner.end_epoch()
        state["epoch"] = epoch + 1
    path = job.folder / "fabric.ckpt"
    if job.save is not None:
        launcher.save(str(path), state)
    return path


CLIENTS = {
    "huggingface": huggingface,
    "lightning": lightning,
    "accelerate": accelerate,
    "fabric": fabric,
}

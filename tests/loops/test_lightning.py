"""The engine in a LightningModule: training, checkpoints of its Trainer, and the callback."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import bayesagg.lightning
from bayesagg.lightning import TaskWeightsCallback
from bayesagg.logging import task_weight_scalars
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net
from tests.helpers.settings import MEMORY, OPTIMIZERS, OUTPUTS, SAMPLED
from tests.helpers.states import assert_finite, assert_same, difference, snapshot, tensors_of
from tests.helpers.training import make_engine
from tests.loops import clients
from tests.loops.runs import epochs_by_hand

# Advice of Lightning's about speed, and of its dependencies about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 3


class Lit(pl.LightningModule):
    """Automatic optimization returns the engine's scalar; manual optimization calls the engine."""

    def __init__(self, rule, automatic=True, outputs=OUTPUTS, seed=0, **kwargs):
        super().__init__()
        self.automatic_optimization = automatic
        self.net = make_net(seed=seed, outputs=outputs)
        kwargs = {"settings": SAMPLED, "steps_per_epoch": None, **kwargs}
        self.engine = make_engine(self.net, rule, **kwargs)

    def configure_optimizers(self):
        optimizer = OPTIMIZERS["adam"](self.net.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)]

    def training_step(self, batch, batch_idx):
        x, labels = batch
        x = x.to(self.net.trunk[0].weight)
        labels = {n: y.to(x) if y.is_floating_point() else y for n, y in labels.items()}
        losses = make_losses(self.net(x), labels)
        if self.automatic_optimization:
            return self.engine(losses)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.engine.backward(losses)
        optimizer.step()

    def on_train_epoch_end(self):
        self.engine.end_epoch()
        if not self.automatic_optimization:
            self.lr_schedulers().step()


MODES = pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])


def loader():
    batches = [make_batch(seed=index) for index in range(STEPS)]
    return DataLoader(batches, batch_size=None, shuffle=False)


def fit(folder, module, epochs, *, callbacks=(), **kwargs):
    keeps = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    kwargs |= {"log_every_n_steps": 1, "enable_checkpointing": keeps, "callbacks": list(callbacks)}
    return clients.fit(module, loader(), folder, epochs, **kwargs)


def state_of(module, trainer):
    return {
        "net": snapshot(module.net),
        "engine": module.engine.get_extra_state(),
        "optimizer": trainer.optimizers[0].state_dict(),
    }


@MODES
def test_a_trainer_takes_the_steps_of_a_loop(automatic, rule, tmp_path):
    """Three epochs under the Trainer are three epochs of the wrapper, bit for bit."""
    module = Lit(rule, automatic)
    trainer = fit(tmp_path, module, 3)
    net, wrapper = epochs_by_hand(rule, 3, gamma=0.5)
    assert trainer.global_step == 3 * STEPS
    assert_same(snapshot(module.net)["parameters"], snapshot(net)["parameters"])
    assert difference(module.engine.get_extra_state(), wrapper.engine.get_extra_state()) is None


def test_a_trainer_accumulates_and_clips_as_a_loop_does(rule, tmp_path):
    """It divides the scalar by the number of batches; one step an epoch."""
    module = Lit(rule)
    trainer = fit(tmp_path, module, 4, accumulate_grad_batches=STEPS, gradient_clip_val=0.1)
    net, wrapper = epochs_by_hand(rule, 4, accumulate=STEPS, clip=0.1, gamma=0.5)
    assert trainer.global_step == 4
    torch.testing.assert_close(list(module.net.parameters()), list(net.parameters()))
    states = [one.get_extra_state()["memory"] for one in (module.engine, wrapper.engine)]
    torch.testing.assert_close(*map(tensors_of, states))


def test_a_trainer_may_use_half_precision(rule, tmp_path):
    """Under its autocast; parameters differ by rounding from those of single precision.

    Labels that are recovered in half precision do not tell data apart, so the memory is fixed.
    """
    ends = []
    for precision in ("bf16-mixed", "32-true"):
        module = Lit(rule, **MEMORY[rule]).float()
        fit(tmp_path, module, 3, precision=precision)
        ends.append(list(module.net.parameters()))
        assert_finite(snapshot(module.net, module.engine))
    torch.testing.assert_close(*ends, rtol=0.1, atol=0.05)


@MODES
@pytest.mark.parametrize("stop", [1, 2], ids=["linear", "after"])
def test_a_trainer_resumes_in_the_same_bits(stop, automatic, rule, tmp_path):
    """Stopped after an epoch and resumed from the Trainer's checkpoint by a new module."""
    whole = Lit(rule, automatic)
    expected = state_of(whole, fit(tmp_path, whole, 4))
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True)
    first = Lit(rule, automatic)
    fit(tmp_path, first, stop, callbacks=[keep])
    saved = torch.load(keep.last_model_path, weights_only=False)["state_dict"]
    assert difference(saved["engine._extra_state"], first.engine.get_extra_state()) is None
    resumed = Lit(rule, automatic, seed=5)
    trainer = fit(tmp_path, resumed, 4, resume=keep.last_model_path)
    assert trainer.current_epoch == 4
    assert difference(expected, state_of(resumed, trainer)) is None


class Recorder(Callback):
    """The weights after every step, from the engine itself."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[trainer.global_step] = task_weight_scalars(module.engine)


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_the_callback_logs_to_every_logger(given, rule, tmp_path):
    """CSV and TensorBoard hold the weights of every second step."""
    module, recorder = Lit(rule), Recorder()
    callback = TaskWeightsCallback(module.engine if given else None, every_n_steps=2)
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    fit(tmp_path, module, 3, callbacks=[callback, recorder], logger=loggers)
    steps = [2, 4, 6, 8]
    names = list(recorder.seen[2])
    assert names[0] == "task_weights/reg/0" and names[-1] == "task_weights/cls"
    assert len({recorder.seen[step]["task_weights/cls"] for step in steps}) > 1
    with open(f"{loggers[0].log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row[names[0]]]
    assert [int(row["step"]) for row in rows] == steps
    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    for name in names:
        expected = [recorder.seen[step][name] for step in steps]
        assert [float(row[name]) for row in rows] == expected
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == steps
        torch.testing.assert_close(
            torch.tensor([scalar.value for scalar in scalars]), torch.tensor(expected)
        )


def test_the_callback_follows_the_trainer(rule, tmp_path):
    """``log_every_n_steps`` of the trainer is the default; a callback serves a second fit."""
    callback = TaskWeightsCallback()
    for _ in range(2):
        logger = CSVLogger(tmp_path)
        fit(tmp_path, Lit(rule), 1, callbacks=[callback], logger=logger)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            assert len(list(csv.DictReader(file))) == STEPS
    assert callback._engine is None


def test_the_callback_wants_one_engine(rule, tmp_path):
    module = Lit(rule)
    module.second = make_engine(module.net, rule)
    with pytest.raises(ValueError, match="has 2 BayesAgg engines"):
        fit(tmp_path, module, 1, callbacks=[TaskWeightsCallback()])
    with pytest.raises(ValueError, match="every_n_steps"):
        TaskWeightsCallback(every_n_steps=0)


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bayesagg.lightning, "Callback", None)
    with pytest.raises(ImportError, match="pip install lightning"):
        TaskWeightsCallback()

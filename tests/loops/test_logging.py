"""Task weights in TensorBoard and in Lightning's loggers; how a Trainer trains: test_clients.py."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import bayesagg.lightning
from bayesagg.lightning import TaskWeightsCallback
from bayesagg.logging import log_task_weights, task_weight_scalars
from tests.helpers.nets import make_net
from tests.helpers.settings import OPTIMIZERS, SAMPLED
from tests.helpers.training import make_engine, train, wrap
from tests.loops.clients import Job, batches_of, lightning, losses_of

# Advice of Lightning's about speed, and of its dependencies about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 3


def test_weights_as_scalars(rule, device, dtype):
    """By task, and by output where a head has several; engine and wrapper alike."""
    net = make_net(device, dtype)
    optimizer = wrap(net, "adam", rule, settings=SAMPLED)
    train(net, optimizer, 5)
    scalars = task_weight_scalars(optimizer, prefix="w/")
    assert list(scalars) == ["w/reg/0", "w/reg/1", "w/bin/0", "w/bin/1", "w/cls"]
    assert sum(scalars.values()) == pytest.approx(1)
    assert scalars["w/reg/1"] == float(optimizer.task_weights["reg"][1])
    assert scalars == task_weight_scalars(optimizer.engine, prefix="w/")


def test_weights_in_tensorboard(rule, tmp_path, device, dtype):
    net = make_net(device, dtype)
    optimizer = wrap(net, "adam", rule, settings=SAMPLED)
    expected = []
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(6):
            train(net, optimizer, [step])
            log_task_weights(writer, optimizer, step)
            expected.append(task_weight_scalars(optimizer)["task_weights/cls"])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("task_weights/cls")
    assert [event.step for event in found] == list(range(6))
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor([e.value for e in found]), torch.tensor(expected))


def test_an_output_under_the_name_of_a_task_is_refused():
    """One of the two would be lost."""
    weights = {"a": torch.tensor([0.2, 0.3]), "a/0": torch.tensor([0.5])}
    with pytest.raises(ValueError, match=r"'task_weights/a/0'.*Rename"):
        task_weight_scalars(SimpleNamespace(task_weights=weights))


def job_of(rule, folder, epochs=1):
    """With an engine, an attribute of the module."""
    net = make_net()
    engine = make_engine(net, rule, settings=SAMPLED, steps_per_epoch=None)
    optimizer = OPTIMIZERS["adam"](net.parameters())
    return Job(net, engine, batches_of(STEPS), losses_of, folder, epochs, optimizer)


def fit(job, callbacks, **kwargs):
    lightning(job, callbacks=callbacks, log_every_n_steps=1, **kwargs)


class Recorder(Callback):
    """The weights after every step, from the engine itself."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.seen[trainer.global_step] = task_weight_scalars(module.owner)


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_the_callback_logs_to_every_logger(given, rule, tmp_path):
    """CSV and TensorBoard hold the weights of every second step."""
    job, recorder = job_of(rule, tmp_path, 3), Recorder()
    callback = TaskWeightsCallback(job.owner if given else None, every_n_steps=2)
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    fit(job, [callback, recorder], logger=loggers)
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
        fit(job_of(rule, tmp_path), [callback], logger=logger)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            assert len(list(csv.DictReader(file))) == STEPS
    assert callback._engine is None


def test_the_callback_wants_one_engine(rule, tmp_path):
    job = job_of(rule, tmp_path)
    job.net.second = make_engine(job.net, rule)
    with pytest.raises(ValueError, match="has 2 BayesAgg engines"):
        fit(job, [TaskWeightsCallback()])
    with pytest.raises(ValueError, match="every_n_steps"):
        TaskWeightsCallback(every_n_steps=0)


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bayesagg.lightning, "Callback", None)
    with pytest.raises(ImportError, match="pip install lightning"):
        TaskWeightsCallback()

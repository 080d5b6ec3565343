"""The callback that logs task weights; how a Trainer trains is in ``test_clients.py``."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bayesagg.lightning
from bayesagg.lightning import TaskWeightsCallback
from bayesagg.logging import task_weight_scalars
from tests.helpers.nets import make_net
from tests.helpers.settings import OPTIMIZERS, SAMPLED
from tests.helpers.training import make_engine
from tests.loops.clients import Job, batches_of, lightning, losses_of

# Advice of Lightning's about speed, and of its dependencies about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 3


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

"""The engine under Accelerate, which prepares model, optimizer, data and scheduler."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import (
    OPTIMIZERS,
    OUTPUTS,
    SAMPLED,
    PaperBayesAgg,
    difference,
    make_batch,
    make_heads,
    make_losses,
    make_net,
    snapshot,
    train,
    wrap,
)

STEPS, BATCH = 3, 6


class Run:
    """A prepared training run; the engine watches the modules before they are prepared."""

    def __init__(self, *, seed=0, accumulate=1):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net = make_net(seed=seed)
        self.engine = PaperBayesAgg(net.trunk, make_heads(net, **SAMPLED))
        optimizer = OPTIMIZERS["adam"](net.parameters())
        batches = [make_batch(seed=index) for index in range(STEPS)]
        data = TensorDataset(
            torch.cat([x for x, _ in batches]),
            *(torch.cat([labels[name] for _, labels in batches]) for name in OUTPUTS),
        )
        self.net, self.optimizer, self.loader = self.accelerator.prepare(
            net, optimizer, DataLoader(data, batch_size=BATCH)
        )
        self.accelerator.register_for_checkpointing(Checkpointed(self.engine))

    def epoch(self):
        for x, *labels in self.loader:
            with self.accelerator.accumulate(self.net):
                losses = make_losses(self.net(x), dict(zip(OUTPUTS, labels, strict=True)))
                scale = self.accelerator.gradient_accumulation_steps
                self.engine.backward({name: loss / scale for name, loss in losses.items()})
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.engine.end_epoch()

    def state(self):
        return {
            "net": snapshot(self.accelerator.unwrap_model(self.net)),
            "engine": self.engine.get_extra_state(),
            "optimizer": self.optimizer.state_dict(),
        }


class Checkpointed:
    """``save_state`` and ``load_state`` want these two names."""

    def __init__(self, engine):
        self.engine = engine

    def state_dict(self):
        return self.engine.get_extra_state()

    def load_state_dict(self, state):
        self.engine.set_extra_state(state)


def test_a_prepared_run_takes_the_steps_of_a_loop():
    """Three epochs are three epochs of the wrapper, bit for bit."""
    run = Run()
    for _ in range(3):
        run.epoch()
    net = make_net()
    wrapper = wrap(net, settings=SAMPLED, steps_per_epoch=STEPS)
    for _ in range(3):
        train(net, wrapper, STEPS)
    found = run.state()
    assert difference(found["net"]["parameters"], snapshot(net)["parameters"]) is None
    assert difference(found["engine"], wrapper.engine.get_extra_state()) is None


@pytest.mark.parametrize("stop", [1, 2], ids=["pretraining", "after"])
def test_a_saved_state_goes_on_in_the_same_bits(stop, tmp_path):
    """``save_state`` and ``load_state`` carry the posterior."""
    whole = Run()
    for _ in range(4):
        whole.epoch()
    first = Run()
    for _ in range(stop):
        first.epoch()
    first.accelerator.save_state(str(tmp_path))
    second = Run(seed=5)
    second.accelerator.load_state(str(tmp_path))
    for _ in range(4 - stop):
        second.epoch()
    assert difference(whole.state(), second.state()) is None


def test_accumulated_batches_are_evidence_of_one_epoch():
    """Three batches for one optimizer step: all of them count."""
    run = Run(accumulate=STEPS)
    before = snapshot(run.net)["parameters"]
    run.epoch()
    counts = [block["full"]["count"].tolist() for block in run.engine.get_extra_state()["blocks"]]
    assert counts == [[STEPS * BATCH] * 2, [STEPS * BATCH] * 2, [STEPS * BATCH]]
    assert difference(before, snapshot(run.net)["parameters"]) is not None
    steps = {int(state["step"]) for state in run.optimizer.state_dict()["state"].values()}
    assert steps == {1}

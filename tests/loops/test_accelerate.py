"""The engine's scalar under Accelerate, which prepares model, optimizer and data."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net
from tests.helpers.settings import OPTIMIZERS, OUTPUTS, SAMPLED
from tests.helpers.states import difference, snapshot
from tests.helpers.training import make_engine, wrap
from tests.loops.clients import accelerate, batches_of, losses_of, state_of
from tests.loops.runs import epochs_by_hand

STEPS, BATCH = 3, 6
# Accelerate's own ``backward``, or the engine's.
FORMS = pytest.mark.parametrize("form", ["scalar", "losses"])


class Run:
    """A prepared training run; the engine watches the modules before they are prepared."""

    def __init__(self, rule, form="scalar", *, seed=0, accumulate=1):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net = make_net(seed=seed)
        self.engine = make_engine(net, rule, settings=SAMPLED, steps_per_epoch=None)
        optimizer = OPTIMIZERS["adam"](net.parameters())
        batches = [make_batch(seed=index) for index in range(STEPS)]
        data = TensorDataset(
            torch.cat([x for x, _ in batches]),
            *(torch.cat([labels[name] for _, labels in batches]) for name in OUTPUTS),
        )
        self.form = form
        self.net, self.optimizer, self.loader = self.accelerator.prepare(
            net, optimizer, DataLoader(data, batch_size=BATCH)
        )
        self.accelerator.register_for_checkpointing(Checkpointed(self.engine))

    def backward(self, losses):
        if self.form == "scalar":  # divided by the number of batches there
            self.accelerator.backward(self.engine(losses))
        else:
            scale = self.accelerator.gradient_accumulation_steps
            self.engine.backward({name: loss / scale for name, loss in losses.items()})

    def epochs(self, count):
        for _ in range(count):
            for x, *labels in self.loader:
                with self.accelerator.accumulate(self.net):
                    losses = make_losses(self.net(x), dict(zip(OUTPUTS, labels, strict=True)))
                    self.backward(losses)
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


@FORMS
@pytest.mark.parametrize("accumulate", [1, STEPS])
def test_a_prepared_run_takes_the_steps_of_a_loop(accumulate, form, rule):
    """Three epochs are three epochs of the wrapper, bit for bit; all micro-batches are evidence."""
    run = Run(rule, form, accumulate=accumulate)
    run.epochs(3)
    net, wrapper = epochs_by_hand(rule, 3, accumulate=accumulate, form=form)
    found = run.state()
    assert difference(found["net"]["parameters"], snapshot(net)["parameters"]) is None
    assert difference(found["engine"], wrapper.engine.get_extra_state()) is None
    steps = {int(state["step"]) for state in run.optimizer.state_dict()["state"].values()}
    assert max(steps) == 9 // accumulate


@pytest.mark.parametrize("stop", [1, 2], ids=["linear", "after"])
def test_a_saved_state_goes_on_in_the_same_bits(stop, rule, tmp_path):
    """``save_state`` and ``load_state`` carry the posterior."""
    whole = Run(rule)
    whole.epochs(4)
    first = Run(rule)
    first.epochs(stop)
    first.accelerator.save_state(str(tmp_path))
    second = Run(rule, seed=5)
    second.accelerator.load_state(str(tmp_path))
    second.epochs(4 - stop)
    assert difference(whole.state(), second.state()) is None


def test_a_prepared_wrapper_is_saved_with_its_posterior(rule, tmp_path):
    """As the optimizer that it is: nothing has to be registered."""
    batches, ends = batches_of(STEPS), []
    for stop in (4, 2):
        net = make_net()
        wrapper = wrap(net, "adam", rule, settings=SAMPLED)
        accelerator = accelerate(net, wrapper, batches, losses_of, tmp_path, stop)
        if stop == 2:
            accelerator.save_state(str(tmp_path))
            net = make_net(seed=5)
            wrapper = wrap(net, "adam", rule, settings=SAMPLED)
            other = Accelerator(cpu=True)
            model, optimizer = other.prepare(net, wrapper)
            other.load_state(str(tmp_path))
            for batch in batches * 2:
                optimizer.zero_grad()
                other.backward(wrapper.loss(losses_of(model, batch)))
                optimizer.step()
        ends.append(state_of(net, wrapper))
    assert difference(*ends) is None

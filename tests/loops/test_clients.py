"""Accumulation, clipping, half precision, checkpoints and mixed data of other packages' loops.

Each is what a plain loop does. That they take its steps is in ``test_networks.py`` for the wrapper.
"""

import pytest
import torch

from tests.helpers.data import losses_over, make_batch, without
from tests.helpers.nets import make_net
from tests.helpers.settings import EPOCH, MEMORY, OPTIMIZERS, SAMPLED
from tests.helpers.states import assert_finite, assert_near, assert_same, snapshot
from tests.helpers.training import make_engine, wrap
from tests.loops.clients import CLIENTS, Job, batches_of, losses_of, plain, state_of

# Of the clients, about speed, themselves and their own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 3
BATCHES = batches_of(EPOCH)
# The client, whether it has an engine beside an optimizer of its own, and its settings.
WAYS = {
    "huggingface": ("huggingface", False, {}),
    "lightning": ("lightning", False, {}),
    "lightning_engine": ("lightning", True, {}),
    "lightning_manual": ("lightning", True, {"manual": True}),
    "accelerate": ("accelerate", False, {}),
    "accelerate_engine": ("accelerate", True, {}),
    "fabric": ("fabric", False, {}),
    "fabric_engine": ("fabric", True, {}),
}


class Run:
    """A network, who owns it, and a loop for them."""

    def __init__(self, way, rule, *, seed=0, dtype=torch.float64, **kwargs):
        client, engine, self.settings = WAYS[way]
        self.client, self.net = CLIENTS[client], make_net(dtype=dtype, seed=seed)
        self.optimizer = None
        if engine:
            kwargs["steps_per_epoch"] = None
            self.owner = make_engine(self.net, rule, settings=SAMPLED, **kwargs)
            self.optimizer = OPTIMIZERS["adam"](self.net.parameters())
        else:
            self.owner = wrap(self.net, "adam", rule, settings=SAMPLED, **kwargs)

    def train(self, folder, epochs=EPOCHS, batches=BATCHES, given=(), **how):
        """``given``: to the client itself."""
        job = self.job(batches, folder, epochs, **how)
        return self.client(job, **self.settings, **dict(given))

    def plainly(self, **how):
        plain(self.job(**how))

    def job(self, batches=BATCHES, folder=None, epochs=EPOCHS, **how):
        kwargs = {"optimizer": self.optimizer, **how}
        return Job(self.net, self.owner, batches, losses_of, folder, epochs, **kwargs)

    def state(self):
        return state_of(self.net, self.owner, self.optimizer)


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][1]])
def test_an_engine_takes_the_steps_of_a_loop(way, rule, tmp_path):
    """In the same bits."""
    ours, theirs = Run(way, rule), Run(way, rule)
    ours.plainly()
    theirs.train(tmp_path)
    assert_same(ours.state(), theirs.state())


@pytest.mark.parametrize(
    ("way", "accumulate"),
    [*((way, EPOCH) for way in WAYS if way != "lightning_manual"), ("huggingface", 2)],
)
def test_a_loop_accumulates_and_clips(way, accumulate, rule, tmp_path):
    """The Trainer also where it counts ``labels`` and would leave the division to the model."""
    how = {"accumulate": accumulate, "clip": 0.1}
    ours, theirs = Run(way, rule), Run(way, rule)
    theirs.net.accepts_loss_kwargs = accumulate == 2  # of a ``forward(..., **kwargs)``
    ours.plainly(**how)
    theirs.train(tmp_path, batches=[{**batch, "labels": batch["cls"]} for batch in BATCHES], **how)
    assert_near(ours.state(), theirs.state())


@pytest.mark.parametrize(
    ("way", "stop"),
    [*((way, epochs * EPOCH) for way in WAYS for epochs in (1, 2)), ("huggingface", EPOCH + 1)],
)
def test_a_loop_resumes_in_the_same_bits(way, stop, rule, tmp_path):
    """From its own checkpoint, in linear scalarization and after it; nothing else is loaded."""
    whole, first, second = Run(way, rule), Run(way, rule), Run(way, rule, seed=5)
    whole.train(tmp_path)
    saved = first.train(tmp_path, -(-stop // EPOCH), save=stop)
    second.train(tmp_path, resume=saved)
    assert_same(whole.state(), second.state())


@pytest.mark.parametrize(
    ("way", "half"),
    [("huggingface", {"bf16": True}), ("lightning_engine", {"precision": "bf16-mixed"})],
)
def test_a_loop_may_use_half_precision(way, half, rule, tmp_path):
    """Parameters differ by rounding from those of single precision.

    Labels that are recovered in half precision do not tell data apart, so the memory is fixed.
    """
    batches = [
        {k: v.float() if v.is_floating_point() else v for k, v in b.items()} for b in BATCHES
    ]
    ends = []
    for how in (half, {}):
        run = Run(way, rule, dtype=torch.float32, **MEMORY[rule])
        run.train(tmp_path, batches=batches, given=how)
        assert_finite(snapshot(run.net, run.owner))
        ends.append(list(run.net.parameters()))
    assert not torch.equal(ends[0][0], ends[1][0])
    torch.testing.assert_close(*ends, rtol=0.1, atol=0.05)


# --- missing labels, tasks of different data sets, alternating batches ---------------------------


def missing(index):
    """Some labels of every task are missing, and in one batch all of one task."""
    x, labels = make_batch(seed=index)
    for number, name in enumerate(labels):
        gaps = (torch.arange(len(x)) + index + number) % 3 == 0
        labels = without(labels, name, gaps | (index == 2 and name == "bin"))
    return {"x": x, **labels}


def two_data_sets(index):
    """Half of the rows are of a data set that knows one task, half of one that knows the others."""
    x, labels = make_batch(seed=index)
    first = torch.arange(len(x)) < len(x) // 2
    for name in labels:
        labels = without(labels, name, ~first if name == "reg" else first)
    return {"x": x, **labels}


def alternating(index):
    """A batch of one data set after one of the other: the tasks of the other are not there."""
    x, labels = make_batch(seed=index)
    names = ["reg"] if index % 2 else ["bin", "cls"]
    return {"x": x, **{name: labels[name] for name in names}}


KINDS = {"missing": missing, "two_data_sets": two_data_sets, "alternating": alternating}


def losses_that_there_are(net, batch):
    """Means over the labels that there are; a task without any is left out."""
    losses = losses_over({n: z for n, z in net(batch["x"]).items() if n in batch}, batch)
    known = {n: batch[n] != -100 if n == "cls" else ~batch[n].isnan() for n in losses}
    return {name: loss for name, loss in losses.items() if known[name].any()}


@pytest.mark.parametrize("client", sorted(CLIENTS))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_steps_are_those_of_a_plain_loop(kind, client, rule, tmp_path):
    """Bit for bit."""
    results = []
    for loop in (plain, CLIENTS[client]):
        net = make_net()
        wrapper = wrap(net, "adam", rule, settings=SAMPLED)
        batches = [KINDS[kind](index) for index in range(4)]
        loop(Job(net, wrapper, batches, losses_that_there_are, tmp_path, 2))
        results.append(state_of(net, wrapper))
    assert_same(*results)

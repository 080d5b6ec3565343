"""Missing labels, tasks of different data sets and alternating batches in loops of others.

Each takes the steps of a plain loop over the same batches, bit for bit.
"""

import pytest
import torch

from tests.helpers.data import LOSSES, make_batch, without
from tests.helpers.nets import make_net
from tests.helpers.settings import SAMPLED
from tests.helpers.states import assert_same
from tests.helpers.training import wrap
from tests.loops.clients import CLIENTS, Job, plain, state_of

# Advice of Lightning's about speed, and of its dependencies about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS, EPOCHS = 4, 2


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


def losses_of(net, batch):
    """Means over the labels that there are; a task without any is left out."""
    losses = {}
    for name, z in net(batch["x"]).items():
        if name in batch:
            y = batch[name]
            known = y != -100 if name == "cls" else ~y.isnan()
            if known.any():
                losses[name] = LOSSES[name](z[known], y[known])
    return losses


@pytest.mark.parametrize("client", sorted(CLIENTS))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_steps_are_those_of_a_plain_loop(kind, client, rule, tmp_path):
    batches = [KINDS[kind](index) for index in range(STEPS)]
    results = []
    for loop in (plain, CLIENTS[client]):
        net = make_net()
        wrapper = wrap(net, "adam", rule, settings=SAMPLED)
        loop(Job(net, wrapper, batches, losses_of, tmp_path, EPOCHS))
        results.append(state_of(net, wrapper))
    assert_same(*results)

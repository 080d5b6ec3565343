"""A long run: flat memory, no new objects or hooks, and nothing left afterwards."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import OUTPUTS, SAMPLED
from tests.helpers.states import assert_finite, assert_same, hooks_of, snapshot, tensors_of
from tests.helpers.training import wrap

STEPS, EPOCH, OTHER = 2_000, 50, 20  # the other model takes one step in OTHER
CHECKS = (1_000, 2_000)  # an epoch of either model has ended
STATM = Path("/proc/self/statm")
ONE = {"reg": 1}


def make(seed, rule, device, dtype, outputs=ONE):
    net = plain_net(device, dtype, seed=seed, outputs=outputs)
    epochs = {"steps_per_epoch": EPOCH} if rule == "paper" else {}
    settings = {**SAMPLED, "reg": {"noise_variance": "learned"}}
    return net, wrap(net, SGD(net.parameters(), lr=1e-3), rule, settings=settings, **epochs)


def step(net, optimizer, x, labels):
    optimizer.zero_grad()
    optimizer.step(make_losses(net(x), labels))


def resident():
    """Bytes of this process in memory; 0 where the system does not say."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def living():
    """Tensors, and objects of any kind."""
    gc.collect()
    found = gc.get_objects()
    return sum(1 for thing in found if issubclass(type(thing), torch.Tensor)), len(found)


@pytest.mark.slow
def test_thousands_of_steps(rule, device, dtype):
    """Beside a model of every kind of head in the same process, which ends as it does alone."""
    batch, another = make_batch(device, dtype, size=4, outputs=ONE), make_batch(device, dtype)
    alone = make(1, rule, device, dtype, OUTPUTS)
    for _ in range(STEPS // OTHER):
        step(*alone, *another)
    expected = snapshot(*alone)
    del alone
    net, optimizer = make(0, rule, device, dtype)
    other = make(1, rule, device, dtype, OUTPUTS)
    found, objects, memory = [], [], []
    for index in range(1, STEPS + 1):
        step(net, optimizer, *batch)
        if index % OTHER == 0:
            step(*other, *another)
        if index in CHECKS:
            states = [one.state_dict() for one in (optimizer, other[1])]
            size = sum(t.numel() for t in tensors_of(states))
            found.append((size, *(sum(map(hooks_of, m.modules())) for m in (net, other[0]))))
            objects.append(living())
            memory.append(resident())
    state = optimizer.engine._memory
    assert (state.steps if rule == "likelihood" else state.epoch * EPOCH) == STEPS
    assert_finite(snapshot(net, optimizer))
    assert found == found[:1] * len(CHECKS)
    # Fewer where an earlier test's are freed meanwhile; an object a step would be a thousand.
    assert objects[0][0] >= objects[1][0]
    assert objects[1][1] - objects[0][1] < 100
    # A leak of 1,500 bytes a step would be half as much again.
    assert memory[-1] - memory[0] < 1 << 20
    assert_same(expected, snapshot(*other))

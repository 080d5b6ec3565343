"""Twenty thousand steps: flat memory, no new tensors or hooks, and nothing left afterwards."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, RegressionHead
from tests.helpers import assert_finite, assert_same, snapshot

STEPS, EPOCH, OTHER = 20_000, 100, 20  # the other model takes one step in OTHER
CHECKS = (8_000, 14_000, 20_000)
STATM = Path("/proc/self/statm")


class Small(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk, self.head = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.trunk(x))


def make(seed, rule, device, dtype):
    net = Small(seed).to(device, dtype)
    heads = {"task": RegressionHead(net.head, noise_variance="learned")}
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    epochs = {"steps_per_epoch": EPOCH} if rule == "paper" else {}
    return net, BayesAggWrapper(sgd, net.trunk, heads, rule=rule, **epochs)


def step(net, optimizer, x, y):
    optimizer.zero_grad()
    optimizer.step({"task": F.mse_loss(net(x), y)})


def hooks(net):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return sum(len(getattr(m, kind)) for m in net.modules() for kind in kinds)


def resident():
    """Bytes of this process in memory; 0 where the system does not say."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors():
    gc.collect()
    return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


@pytest.mark.slow
def test_twenty_thousand_steps(rule, device, dtype):
    """Beside a second model in the same process, which ends as it does alone."""
    x = torch.randn(4, 2, device=device, dtype=dtype)
    y = torch.randn(4, 1, device=device, dtype=dtype)
    alone = make(1, rule, device, dtype)
    for _ in range(STEPS // OTHER):
        step(*alone, x, -y)
    expected = snapshot(*alone)
    del alone
    net, optimizer = make(0, rule, device, dtype)
    other = make(1, rule, device, dtype)
    found = []
    for index in range(1, STEPS + 1):
        step(net, optimizer, x, y)
        if index % OTHER == 0:
            step(*other, x, -y)
        if index in CHECKS:
            found.append((live_tensors(), hooks(net), hooks(other[0]), resident()))
    memory = optimizer.engine._memory
    assert (memory.steps if rule == "likelihood" else memory.epoch * EPOCH) == STEPS
    assert_finite(snapshot(net, optimizer))
    assert [check[1:3] for check in found] == [found[0][1:3]] * len(CHECKS)
    tensors = [check[0] for check in found]  # fewer where an earlier test's are freed meanwhile
    assert tensors == sorted(tensors, reverse=True)
    # A leak of 256 bytes a step would be three times this.
    assert found[-1][3] - found[0][3] < 1 << 20
    assert_same(expected, snapshot(*other))


def test_a_deleted_wrapper_leaves_the_other_one_alone(rule, device, dtype):
    """Engine, evidence and hooks of the first go; the second trains on as it does alone."""
    x = torch.randn(4, 2, device=device, dtype=dtype)
    y = torch.randn(4, 1, device=device, dtype=dtype)
    results = []
    for with_another in (False, True):
        net, optimizer = make(1, rule, device, dtype)
        if with_another:
            first, wrapper = make(0, rule, device, dtype)
        for index in range(3 * EPOCH):
            step(net, optimizer, x, y)
            if with_another and index < 2 * EPOCH:
                step(first, wrapper, x, y)
            if with_another and index == 2 * EPOCH:
                engine = wrapper.engine
                memory = engine._memory
                fades = rule == "likelihood"
                evidence = memory.units[0].gram if fades else memory.states[0].full.precision
                refs = [weakref.ref(thing) for thing in (wrapper, engine, evidence)]
                del wrapper, engine, evidence, memory
                gc.collect()
                assert [ref() for ref in refs] == [None] * 3
                assert hooks(first) == 0 and hooks(net) == 2
        results.append(snapshot(net, optimizer))
    assert_same(*results)

"""Autocast in half precision, and gradient scalers that skip a step.

What a wrapper's step does under a scaler is in ``tests/test_optimizer_loops.py``.
"""

import pytest
import torch

from bayesagg.posterior import augment
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import OPTIMIZERS
from tests.helpers.states import assert_finite, assert_same, snapshot
from tests.helpers.training import make_engine, wrap

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
SINGLE = torch.float32


def autocast_losses(net, device, index, half, size=16):
    x, labels = make_batch(device, SINGLE, seed=index, size=size)
    with torch.autocast(device.type, dtype=half):
        out = net(x)
        return make_losses(out, labels), labels, out


def regression_evidence(optimizer):
    """Gram matrix ``[D, D]``, ``H̃ᵀy`` of both regressions, ``[2, D]``."""
    memory = optimizer.state_dict()["bayesagg"]["memory"]
    if "units" in memory:
        (unit,) = memory["units"]
        return unit["gram"][0], unit["shift"][0, :2]
    group = memory["groups"][0]["running"]
    return group["precision"][0], group["shift"]


@pytest.mark.parametrize("given", [False, True], ids=["recovered", "given"])
@HALVES
def test_the_posterior_is_that_of_the_half_precise_features(half, given, rule, device):
    """Exactly, with labels given; labels read off the losses carry the rounding of the outputs."""
    net = plain_net(device, SINGLE)
    optimizer = wrap(net, "sgd", rule)
    seen = []
    net.trunk.register_forward_hook(lambda module, args, h: seen.append(h.detach()))
    losses, labels, out = autocast_losses(net, device, 0, half)
    assert out["reg"].dtype == out["bin"].dtype == seen[0].dtype == half
    optimizer.step(losses, targets=labels if given else None)
    gram, shift = regression_evidence(optimizer)
    h = augment(seen[0].double(), True)
    torch.testing.assert_close(gram, h.mT @ h)
    expected = labels["reg"].double().mT @ h
    if given:
        torch.testing.assert_close(shift, expected)
    else:
        size = labels["reg"].double().abs().mT @ h.abs()
        assert ((shift - expected).abs() <= 8 * torch.finfo(half).eps * size).all()


@pytest.mark.parametrize("algebra", [torch.float32, torch.float64], ids=str)
@HALVES
def test_a_backward_pass_inside_autocast_is_the_same(half, algebra, rule, device):
    """The posterior algebra keeps its own precision."""
    results = []
    for inside in (False, True):
        net = plain_net(device, SINGLE)
        optimizer = wrap(net, "sgd", rule, dtype=algebra)
        for index in range(7):
            losses, _, _ = autocast_losses(net, device, index, half)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=half, enabled=inside):
                optimizer.backward(losses)
            optimizer.step()
        results.append(snapshot(net, optimizer))
    assert_same(*results)


@HALVES
def test_training_in_half_precision_follows_that_in_single(half, rule, device):
    """Parameters differ by rounding after nine steps; nothing is refused."""
    nets = [plain_net(device, SINGLE) for _ in range(2)]
    optimizers = [wrap(net, "sgd", rule) for net in nets]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=half is torch.float16)
    start = snapshot(nets[0])["parameters"]
    for index in range(9):
        losses, _, _ = autocast_losses(nets[0], device, index, half)
        optimizers[0].zero_grad()
        scaler.scale(optimizers[0].loss(losses)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        x, labels = make_batch(device, SINGLE, seed=index, size=16)
        optimizers[1].zero_grad()
        optimizers[1].step(make_losses(nets[1](x), labels))
    assert scaler.get_scale() == (2.0**12 if half is torch.float16 else 1.0)
    ours, theirs = (snapshot(net)["parameters"] for net in nets)
    assert_finite(snapshot(nets[0], optimizers[0]))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.05, atol=0.02)
    moved = [(theirs[name] - start[name]).abs().max().item() for name in start]
    assert max(moved) > 0.1


class Loop:
    """The engine beside an optimizer of one's own, under a scaler."""

    def __init__(self, device, rule, parts):
        self.net, self.device, self.parts = plain_net(device, SINGLE), device, parts
        self.engine = make_engine(self.net, rule, steps_per_epoch=None)
        self.optimizer = OPTIMIZERS["momentum"](self.net.parameters())
        self.scaler = torch.amp.GradScaler(device.type, init_scale=16.0, growth_interval=10**6)

    def micro(self, index, overflow=None):
        x, labels = make_batch(self.device, SINGLE, seed=index)
        out = self.net(x)
        handle = None
        if overflow is not None:
            where = self.net.trunk[0].weight if overflow == "trunk" else out[overflow]
            handle = where.register_hook(lambda g: g * torch.inf)
        loss = self.engine(make_losses(out, labels)) / self.parts
        self.scaler.scale(loss).backward()
        if handle is not None:
            handle.remove()

    def step(self, index, overflow=None):
        """Over all micro-batches, the last of which may overflow."""
        self.optimizer.zero_grad()
        for part in range(self.parts):
            self.micro(10 * index + part, overflow if part == self.parts - 1 else None)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def steps(self, indices):
        for index in indices:
            self.step(index)
            if index % 3 == 2:
                self.engine.end_epoch()
        return snapshot(self.net, self.engine)


def skip_a_step(device, rule, parts, overflow):
    """After steps of linear scalarization and others."""
    loop, twin = Loop(device, rule, parts), Loop(device, rule, parts)
    for one in (loop, twin):
        one.steps(range(5))
    before = snapshot(loop.net)["parameters"]
    loop.step(5, overflow)
    assert loop.scaler.get_scale() == 8.0
    twin.optimizer.zero_grad()
    for part in range(parts - 1):
        twin.micro(50 + part)
    after = snapshot(loop.net, loop.engine)
    assert_same(
        {"p": {k: v for k, v in before.items() if k.startswith("trunk")}},
        {"p": {k: v for k, v in after["parameters"].items() if k.startswith("trunk")}},
    )
    if overflow == "trunk":
        # The losses were as good as ever: the evidence of the last micro-batch counts too.
        twin.micro(50 + parts - 1)
    expected = snapshot(twin.net, twin.engine)
    assert_same(expected, after, ignore=["gradients"])
    loop.scaler.update(16.0)
    ends = [one.steps(range(6, 9)) for one in (loop, twin)]
    assert_same(*ends)
    assert_finite(ends[0])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("overflow", ["trunk", "reg", "cls"])
def test_a_skipped_step(overflow, parts, rule, device):
    """The network does not move; evidence is that of all micro-batches whose losses were good."""
    skip_a_step(device, rule, parts, overflow)

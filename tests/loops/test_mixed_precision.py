"""Autocast in half precision, and gradient scalers that skip a step.

What a wrapper's step does under a scaler is in ``tests/test_optimizer_loops.py``.
"""

import pytest
import torch

from bayesagg.posterior import augment
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.states import assert_finite, assert_same, snapshot
from tests.helpers.training import wrap

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


def micro_batch(net, optimizer, scaler, device, index, overflow=None):
    """One of three, whose gradient may overflow: at the trunk's weight, or at an output."""
    x, labels = make_batch(device, SINGLE, seed=index)
    out = net(x)
    where = {"trunk": net.trunk[0].weight, **out}.get(overflow)
    handle = None if where is None else where.register_hook(lambda g: g * torch.inf)
    scaler.scale(optimizer.loss(make_losses(out, labels)) / 3).backward()
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("overflow", ["trunk", "reg", "cls"])
def test_a_skipped_step(overflow, rule, device):
    """The trunk does not move; evidence is that of all micro-batches whose losses were good.

    A gradient that overflows at the trunk only does so after losses that were as good as ever.
    """
    ends = []
    for tried in (True, False):
        net = plain_net(device, SINGLE)
        optimizer = wrap(net, "momentum", rule)
        scaler = torch.amp.GradScaler(device.type, init_scale=16.0, growth_interval=10**6)
        for index in range(8):
            optimizer.zero_grad()
            before = snapshot(net.trunk)["parameters"]
            for part in range(3):
                last = index == 5 and part == 2
                if tried or not last or overflow == "trunk":
                    at = overflow if tried and last else None
                    micro_batch(net, optimizer, scaler, device, 10 * index + part, at)
            if index == 5 and not tried:
                continue
            scaler.step(optimizer)
            scaler.update()
            if index == 5:
                assert scaler.get_scale() == 8.0
                assert_same(before, snapshot(net.trunk)["parameters"])
                scaler.update(16.0)
        ends.append(snapshot(net, optimizer))
    assert_same(*ends)
    assert_finite(ends[0])

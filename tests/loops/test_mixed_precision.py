"""Autocast in half precision, and gradient scalers that skip a step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from bayesagg import BayesAgg
from bayesagg.posterior import augment
from tests.helpers import (
    OPTIMIZERS,
    assert_finite,
    assert_same,
    difference,
    make_batch,
    make_heads,
    make_losses,
    make_net,
    snapshot,
    wrap,
)
from tests.loops.test_distributed import trunk

HALVES = [torch.bfloat16, torch.float16]
SINGLE = torch.float32


def autocast_losses(net, device, index, half, size=16):
    x, labels = make_batch(device, SINGLE, seed=index, size=size)
    with torch.autocast(device.type, dtype=half):
        out = net(x)
        return make_losses(out, labels), labels, out


@pytest.mark.parametrize("given", [False, True], ids=["recovered", "given"])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_posterior_is_that_of_the_half_precise_features(half, given, device):
    """Exactly, with labels given; labels read off the losses carry the rounding of the outputs."""
    net = make_net(device, SINGLE, trunk=trunk)
    optimizer = wrap(net, "sgd", steps_per_epoch=None)
    seen = []
    net.trunk.register_forward_hook(lambda module, args, h: seen.append(h.detach()))
    losses, labels, out = autocast_losses(net, device, 0, half)
    assert out["reg"].dtype == out["bin"].dtype == seen[0].dtype == half
    optimizer.step(losses, targets=labels if given else None)
    blocks = optimizer.state_dict()["bayesagg"]["engine"]["blocks"]
    h = augment(seen[0].double(), True)
    torch.testing.assert_close(blocks[0]["running"]["precision"][0], h.mT @ h)
    expected = labels["reg"].double().mT @ h
    if given:
        torch.testing.assert_close(blocks[0]["running"]["shift"], expected)
    else:
        error = (blocks[0]["running"]["shift"] - expected).abs()
        size = labels["reg"].double().abs().mT @ h.abs()
        assert (error <= 8 * torch.finfo(half).eps * size).all()
    for block in blocks[1:]:
        assert (block["running"]["count"] == 16).all()


@pytest.mark.parametrize("algebra", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_backward_pass_inside_autocast_is_the_same(half, algebra, device):
    """The posterior algebra keeps its own precision."""
    results = []
    for inside in (False, True):
        net = make_net(device, SINGLE, trunk=trunk)
        optimizer = wrap(net, "sgd", pretrain_epochs=0, dtype=algebra)
        for index in range(5):
            losses, _, _ = autocast_losses(net, device, index, half)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=half, enabled=inside):
                optimizer.backward(losses)
            optimizer.step()
        results.append(snapshot(net, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_training_in_half_precision_follows_that_in_single(half, device):
    """Parameters differ by rounding after three epochs; nothing is refused."""
    nets = [make_net(device, SINGLE, trunk=trunk) for _ in range(2)]
    optimizers = [wrap(net, "sgd") for net in nets]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=half is torch.float16)
    start = snapshot(nets[0])["parameters"]
    for index in range(9):
        losses, labels, _ = autocast_losses(nets[0], device, index, half)
        optimizers[0].zero_grad()
        optimizers[0].backward({name: scaler.scale(loss) for name, loss in losses.items()})
        scaler.step(optimizers[0])
        scaler.update()
        x, labels = make_batch(device, SINGLE, seed=index, size=16)
        optimizers[1].zero_grad()
        optimizers[1].step(make_losses(nets[1](x), labels))
    ours, theirs = (snapshot(net)["parameters"] for net in nets)
    assert_finite(snapshot(nets[0], optimizers[0]))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.05, atol=0.02)
    moved = [(theirs[name] - start[name]).abs().max().item() for name in start]
    assert max(moved) > 0.1
    assert optimizers[0].engine.epoch == 3


# --- steps that a scaler skips, with the engine alone --------------------------------------------


class Loop:
    """The engine beside an optimizer of one's own, under a scaler."""

    def __init__(self, device, zero="none", follow=True):
        self.net = make_net(device, SINGLE, trunk=trunk)
        self.device = device
        self.engine = BayesAgg(self.net.trunk, make_heads(self.net))
        self.optimizer = OPTIMIZERS["momentum"](self.net.parameters())
        self.to_none = zero == "none"
        if follow:
            self.engine.follow(self.optimizer)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=16.0, growth_interval=10**6)

    def micro(self, index, parts=1, overflow=None):
        x, labels = make_batch(self.device, SINGLE, seed=index)
        out = self.net(x)
        handle = None
        if overflow == "trunk":
            weight = self.net.trunk[0].weight
            handle = weight.register_hook(lambda g: g * torch.inf)
        elif overflow is not None:
            out[overflow].register_hook(lambda g: g * torch.inf)
        losses = make_losses(out, labels)
        scaled = {name: self.scaler.scale(loss / parts) for name, loss in losses.items()}
        self.engine.backward(scaled)
        if handle is not None:
            handle.remove()

    def step(self, indices, overflow=None):
        """One step over one or more micro-batches, the last of which may overflow."""
        self.optimizer.zero_grad(set_to_none=self.to_none)
        for index in indices:
            last = index == indices[-1]
            self.micro(index, len(indices), overflow if last else None)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def run(self, steps, skipped=(), overflow=None, parts=1):
        for step in range(steps):
            indices = [10 * step + part for part in range(parts)]
            if step in skipped:
                scale = self.scaler.get_scale()
                self.step([index + 500 for index in indices], overflow)
                assert self.scaler.get_scale() == scale / 2
                self.scaler.update(scale)
            self.step(indices)
            if step % 3 == 2:
                if step in skipped:  # the epoch may end right after a skipped step
                    scale = self.scaler.get_scale()
                    self.step([index + 700 for index in indices], overflow)
                    self.scaler.update(scale)
                self.engine.end_epoch()
        return snapshot(self.net, self.engine)


@pytest.mark.parametrize("zero", ["none", "zero"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("overflow", ["trunk", "reg", "cls"])
def test_a_skipped_step_leaves_the_posterior_untouched(overflow, parts, zero, device):
    """As if the step had never been tried, whichever micro-batch overflowed."""
    skipped = Loop(device, zero).run(8, skipped=(1, 5), overflow=overflow, parts=parts)
    plain = Loop(device, zero).run(8, parts=parts)
    assert plain["engine"]["epoch"] == 2
    assert plain["engine"]["batches"] == 2
    assert_same(skipped["parameters"], plain["parameters"])
    assert_same(skipped["engine"], plain["engine"], ignore=["draws"])


def test_following_changes_nothing_where_no_step_is_skipped(device):
    ours, plain = Loop(device).run(8), Loop(device, follow=False).run(8)
    assert_same(ours, plain, ignore=["staged", "pending"])


def test_what_is_not_followed_counts_at_once(device):
    """The reason for ``follow``."""
    plain = Loop(device, follow=False).run(8)
    skipped = Loop(device, follow=False).run(8, skipped=(1,), overflow="trunk")
    assert difference(plain["engine"]["blocks"], skipped["engine"]["blocks"]) is not None


def test_following_another_optimizer(device):
    """The last one that was named."""
    loop = Loop(device)
    other = OPTIMIZERS["sgd"](loop.net.parameters())
    loop.engine.follow(other)
    loop.step([0])
    assert loop.engine._pending
    other.step()
    assert not loop.engine._pending
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        loop.engine.follow(object())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_follows_nobody(how, device):
    loop = Loop(device)
    both = (loop.net, loop.engine)
    net, engine = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    x, labels = make_batch(device, SINGLE, seed=0)
    engine.backward(make_losses(net(x), labels))
    assert not engine._pending
    assert not loop.engine._pending


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its scaler and autocast")
@pytest.mark.parametrize("overflow", ["trunk", "reg"])
def test_a_skipped_step_on_a_gpu(overflow):  # pragma: no cover
    device = torch.device("cuda")
    skipped = Loop(device).run(8, skipped=(1, 5), overflow=overflow)
    plain = Loop(device).run(8)
    assert_same(skipped["parameters"], plain["parameters"])
    assert_same(skipped["engine"], plain["engine"], ignore=["draws"])

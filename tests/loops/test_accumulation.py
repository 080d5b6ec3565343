"""What stands between ``backward`` and ``step``, and models beside the one in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from bayesagg.errors import CaptureError
from tests.helpers import (
    QUICK,
    PaperBayesAgg,
    assert_same,
    gradients,
    make_batch,
    make_heads,
    make_losses,
    make_net,
    snapshot,
    train,
    wrap,
)
from tests.loops.test_distributed import (
    assert_equal_runs,
    batch_of,
    result,
    trunk,
)

PARTS = [slice(0, 4), slice(4, 8), slice(8, 12)]


def micro_losses(net, index, part, share):
    x, labels = batch_of(index, part)
    losses = make_losses(net(x), labels)
    return {name: loss * share for name, loss in losses.items()}


def loop(net, optimizer, backward, steps, average=None):
    """Accumulation over three micro-batches, clipping, a schedule, and an average."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.2, 0.1], total_steps=20)
    for index in range(steps):
        optimizer.zero_grad()
        for part in PARTS:
            backward(micro_losses(net, index, part, 1 / len(PARTS)))
        clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(net)


def groups(net):
    return torch.optim.AdamW(
        [{"params": net.trunk.parameters()}, {"params": net.heads.parameters(), "lr": 0.03}],
        lr=0.01,
    )


def test_pretraining_is_the_plain_loop():
    """Micro-batches, clipping, two groups and a schedule, to the last bit."""
    nets = [make_net(trunk=trunk) for _ in range(2)]
    optimizer = wrap(nets[0], groups(nets[0]), pretrain_epochs=9)
    loop(nets[0], optimizer, optimizer.backward, 5)
    plain = groups(nets[1])
    loop(nets[1], plain, lambda losses: sum(losses.values()).backward(), 5)
    assert_same(snapshot(nets[0])["parameters"], snapshot(nets[1])["parameters"])


@pytest.mark.parametrize("follow", [False, True])
def test_the_engine_alone_accumulates_as_the_wrapper_does(follow):
    nets = [make_net(trunk=trunk) for _ in range(2)]
    optimizer = wrap(nets[0], groups(nets[0]), steps_per_epoch=None)
    engine = PaperBayesAgg(nets[1].trunk, make_heads(nets[1]))
    base = groups(nets[1])
    if follow:
        engine.follow(base)
    for _ in range(3):
        loop(nets[0], optimizer, optimizer.backward, 3)
        optimizer.end_epoch()
        loop(nets[1], base, engine.backward, 3)
        engine.end_epoch()
    ours, theirs = (snapshot(net)["parameters"] for net in nets)
    torch.testing.assert_close(ours, theirs)
    states = [thing.get_extra_state()["blocks"] for thing in (optimizer.engine, engine)]
    torch.testing.assert_close(*states)
    assert engine.epoch == 3


def test_an_epoch_of_micro_batches_is_an_epoch_of_batches():
    """The full-data posterior does not see how a batch was divided."""
    found = []
    for parts in ([slice(0, 12)], PARTS):
        net = make_net(trunk=trunk)
        optimizer = wrap(net, torch.optim.SGD(net.parameters(), lr=0.0), steps_per_epoch=2)
        for index in range(6):
            optimizer.zero_grad()
            for part in parts:
                optimizer.backward(micro_losses(net, index, part, 1 / len(parts)))
            optimizer.step()
        assert optimizer.engine.epoch == 3
        found.append(result(net, optimizer))
    torch.testing.assert_close(found[0]["engine"]["blocks"], found[1]["engine"]["blocks"])
    torch.testing.assert_close(found[0]["parameters"], found[1]["parameters"])


def rows_of(rank, part):
    """This rank's half of a micro-batch."""
    middle = (part.start + part.stop) // 2
    return slice(part.start, middle) if rank == 0 else slice(middle, part.stop)


def accumulating(rank, steps=8):
    """Gradients are exchanged with the last micro-batch only, evidence with each."""
    net = make_net(trunk=trunk)
    model = net if rank is None else DistributedDataParallel(net)
    optimizer = wrap(net, "momentum")
    for index in range(steps):
        optimizer.zero_grad()
        for part in PARTS:
            rows = part if rank is None else rows_of(rank, part)
            if rank is None or part is PARTS[-1]:
                optimizer.backward(micro_losses(model, index, rows, 1 / len(PARTS)))
            else:
                with model.no_sync():
                    optimizer.backward(micro_losses(model, index, rows, 1 / len(PARTS)))
        optimizer.step()
    return result(net, optimizer)


def test_ranks_accumulate_without_synchronising(ranks):
    assert_equal_runs(accumulating(None), ranks.run(accumulating))


# --- models beside it ----------------------------------------------------------------------------

AVERAGES = {
    "ema": lambda net: swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn()),
    "swa": swa_utils.AveragedModel,
}


@pytest.mark.parametrize("kind", sorted(AVERAGES))
@pytest.mark.parametrize("early", [True, False], ids=["made_before", "made_after"])
def test_an_average_beside_the_model(early, kind):
    """Its forward passes, in any mode, are not those of the model; it averages what it should."""
    results, averages = [], []
    for used in (False, True):
        net = make_net()
        average = AVERAGES[kind](net) if early else None
        optimizer = wrap(net, "momentum", settings=QUICK)
        average = average or AVERAGES[kind](net)
        seen = []
        for index in range(7):
            x, labels = make_batch(seed=index)
            losses = make_losses(net(x), labels)
            if used:
                average.train()
                sum(make_losses(average(x + 1), labels).values()).backward()
                average.eval()
                average(x)
            optimizer.zero_grad()
            optimizer.step(losses)
            average.update_parameters(net)
            seen.append(net.heads["reg"].weight.detach().clone())
        if used:
            swa_utils.update_bn([make_batch(seed=index)[0] for index in range(3)], average)
        assert not any(
            type(h).__name__ == "_Hook"
            for m in average.modules()
            for h in m._forward_hooks.values()
        )
        results.append(snapshot(net, optimizer))
        averages.append(average)
        if kind == "swa":
            mean = torch.stack(seen).mean(0)
            torch.testing.assert_close(average.module.heads["reg"].weight.detach(), mean)
    assert_same(*results)
    averaged = [list(average.module.parameters()) for average in averages]
    torch.testing.assert_close(*averaged)


# --- two forward passes --------------------------------------------------------------------------


def two_passes(net, optimizer, targets):
    """A step whose first loss depends on two forward passes; what it raises, and a way out."""
    batches = [make_batch(seed=index) for index in (50, 51)]
    outs = [net(x) for x, _ in batches]
    losses = [make_losses(out, labels) for out, (_, labels) in zip(outs, batches, strict=True)]
    both = {**losses[1], "bin": losses[0]["bin"] + losses[1]["bin"]}
    given = batches[1][1] if targets else None
    before = snapshot(net, optimizer)
    with pytest.raises(CaptureError, match=r"task 'bin'.*two forward passes.*one batch"):
        optimizer.step(both, targets=given)
    assert_same(before, snapshot(net, optimizer))
    return losses[1]


@pytest.mark.parametrize("targets", [False, True], ids=["recovered", "given"])
@pytest.mark.parametrize("steps", [1, 4], ids=["pretraining", "after"])
def test_two_forward_passes_in_one_loss_are_refused(steps, targets):
    """The last alone would be aggregated; by itself it still can be."""
    net = make_net(trunk=trunk)
    optimizer = wrap(net, "sgd", settings=QUICK)
    train(net, optimizer, steps)
    optimizer.zero_grad()  # gradients are not copied
    twin_net, twin = copy.deepcopy((net, optimizer))
    optimizer.step(two_passes(net, optimizer, targets))
    x, labels = make_batch(seed=51)
    twin.step(make_losses(twin_net(x), labels))
    assert_same(snapshot(net)["parameters"], snapshot(twin_net)["parameters"])


def test_a_backward_pass_for_each_forward_pass():
    """The way out that the error names."""
    net = make_net(trunk=trunk)
    optimizer = wrap(net, "sgd")
    train(net, optimizer, 4)
    alone = []
    for index in (50, 51):
        x, labels = make_batch(seed=index)
        optimizer.zero_grad()
        optimizer.backward(make_losses(net(x), labels))
        alone.append(gradients(net))
    optimizer.zero_grad()
    for index in (50, 51):
        x, labels = make_batch(seed=index)
        optimizer.backward(make_losses(net(x), labels))
    for name, gradient in gradients(net).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, alone[0][name] + alone[1][name])


# --- activation checkpointing --------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Activations of the trunk, or of trunk and heads, are computed again in the backward pass."""

    def __init__(self, net, where, reentrant):
        super().__init__()
        self.net, self.where, self.reentrant = net, where, reentrant

    def forward(self, x):
        if self.where == "whole":
            return checkpoint(self.net, x, use_reentrant=self.reentrant)
        if self.where == "layers":
            h = x
            for layer in self.net.trunk[:-1]:
                h = checkpoint(layer, h, use_reentrant=self.reentrant)
            h = self.net.trunk[-1](h)
        else:
            h = checkpoint(self.net.trunk, x, use_reentrant=self.reentrant)
        return {name: head(h) for name, head in self.net.heads.items()}


def last_layer(net):
    return net.trunk[-1]


@pytest.mark.parametrize(
    ("where", "reentrant", "hook"),
    [
        ("trunk", False, lambda net: net.trunk),
        ("whole", False, lambda net: net.trunk),
        ("whole", False, lambda net: None),
        ("layers", False, last_layer),
        ("layers", True, last_layer),
        ("trunk", True, lambda net: net.trunk),
    ],
    ids=["trunk", "whole", "whole_no_hook", "layers", "layers_reentrant", "trunk_reentrant"],
)
def test_activation_checkpointing(where, reentrant, hook):
    """Hooks that fire again in the backward pass report nothing."""
    results = []
    for wrapped in (False, True):
        net = make_net(trunk=trunk)
        optimizer = wrap(net, "momentum", settings=QUICK, shared_rep_hook=hook(net))
        model = Checkpointed(net, where, reentrant) if wrapped else net
        for index in range(7):
            x, labels = make_batch(seed=index)
            optimizer.zero_grad()
            losses = make_losses(model(x.requires_grad_()), labels)
            optimizer.engine._capture.group = "noted by the forward pass"
            optimizer.step(losses)
            assert optimizer.engine._capture.h is None
            assert optimizer.engine._capture.group == "noted by the forward pass"
        results.append(snapshot(net, optimizer))
    assert_same(*results)


def test_heads_inside_reentrant_checkpointing_are_refused():
    """Its forward pass is made without gradients."""
    net = make_net(trunk=trunk)
    optimizer = wrap(net)
    x, labels = make_batch()
    losses = {}

    def forward(x):
        losses.update(make_losses(net(x), labels))
        return sum(losses.values())

    total = checkpoint(forward, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(CaptureError, match="gradients enabled"):
        optimizer.step({name: total / 3 for name in losses})

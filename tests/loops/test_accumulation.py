"""What stands between ``backward`` and ``step``, and models beside the one in training.

Under accumulation every micro-batch is a batch to the evidence: its data count once, but fade by
micro-batches, heads move after each backward pass, and the data that a leave-one-out gradient
leaves in are those so far. So gradients are those of the whole batch while training is linear
scalarization, and near them afterwards.
"""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from bayesagg.errors import CaptureError
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import FOREVER, GRADIENT, QUICK
from tests.helpers.states import assert_near, assert_same, snapshot
from tests.helpers.training import run, train, wrap
from tests.loops.runs import ROWS, assert_equal_runs, batch_of, result

PARTS = [slice(0, 4), slice(4, 8), slice(8, 12)]


def micro_losses(net, index, part):
    x, labels = batch_of(index, part)
    return make_losses(net(x), labels)


def divided(optimizer, losses):
    """What a trainer does: the scalar divided by the number of micro-batches."""
    (optimizer.loss(losses) / len(PARTS)).backward()


def test_linear_scalarization_is_the_plain_loop(rule):
    """Micro-batches, clipping, two groups and a schedule, to the last bit."""
    results = []
    for wrapped in (True, False):
        net = plain_net()
        heads = {"params": net.heads.parameters(), "lr": 0.03}
        optimizer = torch.optim.AdamW([{"params": net.trunk.parameters()}, heads], lr=0.01)
        if wrapped:
            optimizer = wrap(net, optimizer, rule, **FOREVER[rule])
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.2, 0.1], total_steps=20)
        for index in range(5):
            optimizer.zero_grad()
            for part in PARTS:
                losses = micro_losses(net, index, part)
                if wrapped:
                    divided(optimizer, losses)
                else:
                    (sum(losses.values()) / len(PARTS)).backward()
            clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            schedule.step()
        results.append(snapshot(net)["parameters"])
    assert_same(*results)


def evidence(memory):
    """Matrices and vectors that are sums over data."""
    if "units" in memory:
        return [[unit["gram"], unit["shift"]] for unit in memory["units"]]
    return [[group["full"][key] for key in ("precision", "shift")] for group in memory["groups"]]


def test_the_evidence_of_micro_batches_is_that_of_the_batch(rule):
    """It does not see how a batch was divided, where the network is still and nothing fades."""
    found = []
    kwargs = {"memory": 10**9} if rule == "likelihood" else {"steps_per_epoch": 2}
    for parts in ([slice(0, ROWS)], PARTS):
        net = plain_net()
        base = torch.optim.SGD(net.parameters(), lr=0.0)
        optimizer = wrap(net, base, rule, settings=GRADIENT, **kwargs)
        for index in range(6):
            optimizer.zero_grad()
            for part in parts:
                (optimizer.loss(micro_losses(net, index, part)) / len(parts)).backward()
            optimizer.step()
        found.append(evidence(optimizer.state_dict()["bayesagg"]["memory"]))
    assert_near(*found, tolerance=1e-6)


def learnable(index, size=48):
    """Labels that follow from the inputs but for noise, so that heads settle."""
    x, _ = make_batch(seed=index, size=size)
    weights = make_batch(seed=3, size=7)[0].T
    z = torch.tanh(x) @ weights + 0.3 * make_batch(seed=1000 + index, size=size, inputs=7)[0]
    return x, {"reg": z[:, :2], "bin": (z[:, 2:4] > 0).to(x), "cls": z[:, 4:].argmax(1)}


def test_micro_batches_are_near_the_batch(rule):
    """Once there is evidence: four parts, in direction and length."""
    net = plain_net()
    kwargs = {"memory": 600} if rule == "likelihood" else {"steps_per_epoch": 10}
    optimizer = wrap(net, "adam", rule, **kwargs)
    for index in range(30):
        x, labels = learnable(index)
        optimizer.zero_grad()
        optimizer.step(make_losses(net(x), labels))
    found = []
    x, labels = learnable(99)
    for parts in (1, 4):
        other, theirs = copy.deepcopy((net, optimizer))
        theirs.zero_grad()
        for rows in torch.arange(len(x)).chunk(parts):
            losses = make_losses(other(x[rows]), {name: y[rows] for name, y in labels.items()})
            (theirs.loss(losses) / parts).backward()
        found.append(torch.cat([p.grad.flatten() for p in other.trunk.parameters()]))
    whole, four = found
    assert torch.cosine_similarity(whole, four, 0) > 0.99
    assert four.norm() / whole.norm() == pytest.approx(1, abs=0.1)


def rows_of(rank, part):
    """This rank's half of a micro-batch."""
    middle = (part.start + part.stop) // 2
    return {None: part, 0: slice(part.start, middle), 1: slice(middle, part.stop)}[rank]


def accumulating(rank, rule):
    """Gradients are exchanged with the last micro-batch only, evidence with each."""
    net = plain_net()
    model = net if rank is None else DistributedDataParallel(net)
    optimizer = wrap(net, "momentum", rule)
    for index in range(8):
        optimizer.zero_grad()
        for part in PARTS:
            last = rank is None or part is PARTS[-1]
            with torch.enable_grad() if last else model.no_sync():
                divided(optimizer, micro_losses(model, index, rows_of(rank, part)))
        optimizer.step()
    return result(net, optimizer)


def test_ranks_accumulate_without_synchronising(rule, ranks):
    both = ranks.run(accumulating, rule)
    assert_equal_runs(accumulating(None, rule), both, rule)


# --- models beside it ----------------------------------------------------------------------------

AVERAGES = {
    "ema": lambda net: swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn()),
    "swa": swa_utils.AveragedModel,
}


@pytest.mark.parametrize("kind", sorted(AVERAGES))
@pytest.mark.parametrize("early", [True, False], ids=["made_before", "made_after"])
def test_an_average_beside_the_model(early, kind, rule):
    """Its forward passes, in any mode, are not those of the model; it averages what it should."""
    results = []
    for used in (False, True):
        net = make_net()
        average = AVERAGES[kind](net) if early else None
        optimizer = wrap(net, "momentum", rule, settings=QUICK)
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
        averaged = {name: p.detach() for name, p in average.module.named_parameters()}
        results.append({**snapshot(net, optimizer), "average": averaged})
        if kind == "swa":
            torch.testing.assert_close(averaged["heads.reg.weight"], torch.stack(seen).mean(0))
    assert_same(*results)


def test_every_forward_pass_serves_one_scalar(rule):
    """A pass that was made before another one's losses were asked for is over with them."""
    net = plain_net()
    optimizer = wrap(net, "sgd", rule)
    train(net, optimizer, 4)
    first, second = (micro_losses(net, index, slice(0, 6)) for index in (50, 51))
    optimizer.zero_grad()
    optimizer.backward(second)
    before = snapshot(net, optimizer)
    with pytest.raises(CaptureError, match="before each"):
        optimizer.backward(first)
    assert_same(before, snapshot(net, optimizer))


# --- activation checkpointing --------------------------------------------------------------------


def by_layers(net, x):
    h = x
    for layer in net.trunk[:-1]:
        h = checkpoint(layer, h, use_reentrant=True)
    h = net.trunk[-1](h)
    return {name: head(h) for name, head in net.heads.items()}


def trunk_alone(net, x, reentrant):
    h = checkpoint(net.trunk, x, use_reentrant=reentrant)
    return {name: head(h) for name, head in net.heads.items()}


# What is computed again in the backward pass, and the module that is named.
RECOMPUTED = {
    "whole": (lambda net, x: checkpoint(net, x, use_reentrant=False), lambda net: net.trunk),
    "trunk": (lambda net, x: trunk_alone(net, x, False), lambda net: net.trunk),
    "trunk_reentrant": (lambda net, x: trunk_alone(net, x, True), lambda net: net.trunk),
    "layers_reentrant": (by_layers, lambda net: net.trunk[-1]),
}


@pytest.mark.parametrize("where", RECOMPUTED)
def test_activation_checkpointing(where, rule):
    """Hooks that fire again in the backward pass report nothing."""
    recomputed, hook = RECOMPUTED[where]

    def step(optimizer, losses, labels):
        capture = optimizer.engine._capture
        capture.group = "noted by the forward pass"
        optimizer.step(losses)
        assert not any(capture.calls.values())
        assert capture.group == "noted by the forward pass"

    def forward(net, x):
        return recomputed(net, x.requires_grad_())

    results = []
    for how in ({}, {"forward": forward, "step": step}):
        net = plain_net()
        how = {"settings": QUICK, "shared_rep_hook": hook(net), **how}
        results.append(run(net, rule, "momentum", 7, **how))
    assert_same(*results)


def test_heads_inside_of_a_reentrant_checkpoint(rule):
    """Which runs without gradients, so that nothing is seen of them."""
    net = plain_net()
    optimizer = wrap(net, "sgd", rule)
    x, labels = make_batch()

    def forward(x):
        return tuple(net(x).values())

    out = checkpoint(forward, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        optimizer.step(make_losses(dict(zip(net.heads, out, strict=True)), labels))


def test_heads_inside_reentrant_checkpointing_are_refused(rule):
    """Its forward pass is made without gradients."""
    net = plain_net()
    optimizer = wrap(net, rule=rule)
    x, labels = make_batch()
    losses = {}

    def forward(x):
        losses.update(make_losses(net(x), labels))
        return sum(losses.values())

    total = checkpoint(forward, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(CaptureError, match="with gradients"):
        optimizer.step({name: total / 3 for name in losses})

"""Partially labelled data in loops: random holes, disjoint data sets, a task without labels."""

from __future__ import annotations

import copy

import pytest
import torch
from bayesagg.observe import observe
from torch import nn
from torch.nn import functional as F

from bayesagg.posterior import augment
from tests.helpers import (
    OUTPUTS,
    QUICK,
    SAMPLED,
    WIDTH,
    assert_finite,
    assert_same,
    difference,
    gradients,
    make_batch,
    make_losses,
    make_net,
    snapshot,
    wrap,
)


def plain_net(device, dtype):
    """Every datum by itself: no batch normalisation."""
    return make_net(device, dtype, trunk=lambda: nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh()))


def drop(labels, rate, seed):
    """Labels with random holes, and where labels are left (per output)."""
    generator = torch.Generator().manual_seed(seed)
    holes, kept = {}, {}
    for name, y in labels.items():
        kept[name] = (torch.rand(y.shape, generator=generator) >= rate).to(y.device)
        holes[name] = y.masked_fill(~kept[name], -100 if name == "cls" else torch.nan)
    return holes, kept


def masked_losses(out, holes, kept):
    """Means over the labels that are left."""
    losses = {}
    for name, z in out.items():
        if name == "cls":
            losses[name] = F.cross_entropy(z, holes[name])
        else:
            z, y = z[kept[name]], holes[name][kept[name]]
            losses[name] = make_losses({name: z}, {name: y})[name]
    return losses


# --- random holes --------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.2, 0.6])
@pytest.mark.parametrize("given", [False, True], ids=["masked_losses", "targets"])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["quadrature", "sampled"])
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_dropped_labels_leave_the_moments_of_the_others(full, settings, given, rate, device, dtype):
    """Under one posterior, E[g] and Var[g] of a labelled datum do not depend on the others."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, settings=settings)
    for index in range(4):
        x, labels = make_batch(device, dtype, seed=index)
        optimizer.step(make_losses(net(x), labels))
    x, labels = make_batch(device, dtype, seed=9, size=20)
    holes, kept = drop(labels, rate, 1)
    engine, found = optimizer.engine, []
    for seen, everywhere in ((labels, True), (holes, False)):
        h = net.trunk(x)
        out = {name: head(h) for name, head in net.heads.items()}
        losses = make_losses(out, seen) if everywhere else masked_losses(out, seen, kept)
        targets = seen if given else {}
        observed = observe(losses, out, targets, engine.heads, False)
        features = augment(h.detach().to(engine.dtype), True)
        for block in engine._blocks:
            read = block.labels(observed, len(x), torch.device(device))
            generator = torch.Generator(device).manual_seed(0)
            posterior, dtype = block.posterior(None), features.dtype
            if full:
                moments = block.covariances(features, read, posterior, generator)
            else:
                moments = block.moments(features, read, posterior, generator, dtype)
            found.append((read.present, moments))
    blocks = engine._blocks
    for block, (whole, moments), (present, others) in zip(
        blocks, found[: len(blocks)], found[len(blocks) :], strict=True
    ):
        assert whole is None
        expected = torch.cat([kept[name].view(20, -1) for name in block.names], dim=1)
        assert torch.equal(present, expected) and not expected.all() and expected.any()
        for one, two in zip(moments, others, strict=True):
            torch.testing.assert_close(one[present], two[present])


def test_a_run_with_most_labels_missing_learns(device, dtype):
    """Seven labels of ten are missing: every task still gets better."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, settings=QUICK, steps_per_epoch=10)
    x, labels = make_batch(device, dtype, seed=0, size=80)
    targets = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    labels["reg"] = x @ targets
    labels["bin"] = (x @ targets > 0).to(dtype)
    labels["cls"] = x[:, :3].argmax(1)
    holes, kept = drop(labels, 0.7, 2)
    before = make_losses(net(x), labels), masked_losses(net(x), holes, kept)
    for index in range(300):
        rows = torch.arange(index % 10, 80, 10, device=device)
        some = [{n: t[rows] for n, t in part.items()} for part in (holes, kept)]
        optimizer.zero_grad()
        optimizer.step(masked_losses(net(x[rows]), *some))
    after = make_losses(net(x), labels), masked_losses(net(x), holes, kept)
    assert_finite(snapshot(net, optimizer))
    better = [{n for n in OUTPUTS if a[n] < 0.8 * b[n]} for a, b in zip(after, before, strict=True)]
    assert better[0] >= {"reg", "bin"}  # two dozen classes say too little of the others
    assert better[1] == set(OUTPUTS)


# --- disjoint data sets --------------------------------------------------------------------------


def alternate(net, optimizer, names, steps):
    """Batches of one task after those of another; data and task follow from the step."""
    like = next(net.parameters())
    order = list(OUTPUTS)
    for index in steps:
        name = order[index % len(order)]
        if name not in names:
            continue
        x, labels = make_batch(like.device, like.dtype, seed=index)
        optimizer.zero_grad()
        optimizer.step(make_losses({name: net(x)[name]}, labels))


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_alternating_tasks_gather_their_evidence_alone(name, device, dtype):
    """With the network held still, a task's posterior is that of a run on its own data."""
    found = []
    for names in (list(OUTPUTS), [name]):
        net = plain_net(device, dtype)
        optimizer = wrap(net, torch.optim.SGD(net.parameters(), lr=0.0), steps_per_epoch=None)
        alternate(net, optimizer, names, range(9))
        blocks = {block.names[0]: block for block in optimizer.engine._blocks}
        optimizer.end_epoch()
        part = {key: t for key, t in blocks[name].full.tensors().items()}
        part["precision"] = part["precision"].expand(len(part["count"]), -1, -1)
        found.append((part, blocks[name].posterior(None).mean))
    torch.testing.assert_close(*found)
    assert found[0][0]["count"].tolist() == [18] * len(found[0][0]["count"])


def test_alternating_tasks_do_not_touch_each_other(device, dtype):
    """One task at a time: it has all of the weight, and the heads of the others stay."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, settings=QUICK, steps_per_epoch=6)
    alternate(net, optimizer, list(OUTPUTS), range(12))
    for index, name in enumerate(list(OUTPUTS), start=12):
        before = copy.deepcopy(net.heads.state_dict())
        alternate(net, optimizer, list(OUTPUTS), [index])
        weights = optimizer.task_weights
        total = sum(float(part.sum()) for part in weights.values())
        assert total == pytest.approx(1) and float(weights[name].sum()) == pytest.approx(1)
        for key, value in net.heads.state_dict().items():
            own = key.startswith(name) and name != "reg"  # the posterior sets that head
            assert torch.equal(value, before[key]) != own, key
    assert_finite(snapshot(net, optimizer))


# --- a whole task without labels -----------------------------------------------------------------


@pytest.mark.parametrize("absent", list(OUTPUTS))
@pytest.mark.parametrize("spelling", ["zero_loss", "targets"])
@pytest.mark.parametrize("steps", [1, 4], ids=["pretraining", "after"])
def test_a_task_without_labels_may_have_a_loss(steps, spelling, absent, device, dtype):
    """A loss of zero, with or without targets that are all missing, is no loss at all."""
    results = []
    for left_out in (True, False):
        net = plain_net(device, dtype)
        optimizer = wrap(net, "sgd", settings=QUICK)
        for index in range(steps):
            x, labels = make_batch(device, dtype, seed=index)
            optimizer.zero_grad()
            optimizer.step(make_losses(net(x), labels))
        x, labels = make_batch(device, dtype, seed=9)
        losses = make_losses(net(x), labels)
        optimizer.zero_grad()
        if left_out:
            del losses[absent]
            optimizer.step(losses)
        else:
            losses[absent] = losses[absent] * 0
            missing = torch.full_like(labels[absent], -100 if absent == "cls" else torch.nan)
            optimizer.step(losses, targets={absent: missing} if spelling == "targets" else None)
        results.append((gradients(net.trunk), snapshot(net, optimizer)))
    torch.testing.assert_close(results[0][0], results[1][0])
    engines = [snap["optimizer"]["bayesagg"]["engine"] for _, snap in results]
    torch.testing.assert_close(*[part.pop("task_weights") for part in engines])
    assert difference(*[[b["running"] for b in part["blocks"]] for part in engines]) is None
    assert float(results[0][1]["optimizer"]["bayesagg"]["steps"]) == steps % 3 + 1
    assert_finite([snap["parameters"] for _, snap in results])


def test_an_order_of_batches_is_all_that_matters(device, dtype):
    """The same partially labelled run twice gives the same bits."""
    results = []
    for _ in range(2):
        net = plain_net(device, dtype)
        optimizer = wrap(net, settings=SAMPLED)
        alternate(net, optimizer, list(OUTPUTS), range(9))
        results.append(snapshot(net, optimizer))
    assert_same(*results)

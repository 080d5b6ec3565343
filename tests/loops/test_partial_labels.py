"""Partially labelled data in loops: random holes, disjoint data sets, a task without labels."""

import copy

import pytest
import torch

from tests.helpers.data import losses_over, make_batch, make_losses, without
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, OUTPUTS, PHASES, QUICK, READOUT, SAMPLED
from tests.helpers.states import assert_finite, assert_near, assert_same, gradients, snapshot
from tests.helpers.training import train, wrap


def drop(labels, rate, seed):
    """Labels with random holes, by output."""
    generator = torch.Generator().manual_seed(seed)
    for name, y in labels.items():
        gaps = (torch.rand(y.shape, generator=generator) < rate).to(y.device)
        labels = without(labels, name, gaps)
    return labels


# --- random holes --------------------------------------------------------------------------------


def labelled(name, y):
    """Whether a datum has all labels of a task, ``[N]``."""
    return (y != -100) if name == "cls" else ~y.isnan().any(1)


RULES = {
    "likelihood": ("likelihood", {"keep_length": False}),
    "diagonal": ("paper", {}),
    "full": ("paper", {"covariance": "full"}),
    "sampled": ("paper", {"settings": SAMPLED}),
}


def certain(optimizer, factor=1e9):
    """Evidence so large that a batch has no say in the posterior."""
    state = optimizer.state_dict()
    memory = state["bayesagg"]["memory"]
    for part in memory.get("units", []) or [group["full"] for group in memory["groups"]]:
        for key in part.keys() & {"gram", "shift", "precision"}:
            part[key] *= factor
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("rate", [0.2, 0.6])
@pytest.mark.parametrize("given", [False, True], ids=["recovered", "targets"])
@pytest.mark.parametrize("kind", sorted(RULES))
def test_dropped_labels_leave_the_gradients_of_the_others(kind, given, rate, device):
    """Under one posterior, what a datum with all labels says does not depend on the others."""
    rule, kwargs = RULES[kind]
    net = plain_net(device)
    optimizer = wrap(net, "sgd", rule, **kwargs)
    train(net, optimizer, 4)
    certain(optimizer)
    x, labels = make_batch(device, seed=9, size=40)
    holes = drop(labels, rate, 1)
    complete = torch.stack([labelled(name, y) for name, y in holes.items()]).all(0)
    assert 0 < complete.sum() < 40
    found = []
    for seen in (labels, holes):
        other, theirs = copy.deepcopy((net, optimizer))
        h = other.trunk(x)
        h.retain_grad()
        losses = losses_over({name: head(h) for name, head in other.heads.items()}, seen)
        # Sums over labels: how many there are has no say.
        count = {n: (y != -100 if n == "cls" else ~y.isnan()).sum() for n, y in seen.items()}
        losses = {name: loss * count[name] for name, loss in losses.items()}
        theirs.backward(losses, targets=seen if given else None)
        found.append(h.grad[complete])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-8)


def gone(name):
    """All labels of a task are missing, in the first step and later."""

    def change(labels, index):
        gaps = torch.ones(20, dtype=torch.bool, device=labels[name].device)
        return without(labels, name, gaps) if index in (0, 3, 6) else labels

    return change


# What is left of the labels of a step, by its number.
HOLES = {
    "few": lambda labels, index: drop(labels, 0.2, index),
    "many": lambda labels, index: drop(labels, 0.6, index),
    **{name: gone(name) for name in OUTPUTS},
}


@pytest.mark.parametrize("holes", HOLES)
def test_holes_are_recovered_as_they_are_given(holes, rule, device):
    """Also where the loss of a task without any label is zero times an output."""
    results = []
    for given in (False, True):
        net = plain_net(device)
        optimizer = wrap(net, "momentum", rule)
        for index in range(8):
            x, labels = make_batch(device, seed=index, size=20)
            labels = HOLES[holes](labels, index)
            optimizer.zero_grad()
            optimizer.step(losses_over(net(x), labels), targets=labels if given else None)
        results.append([snapshot(net)["parameters"], optimizer.state_dict()["bayesagg"]["memory"]])
    assert_near(*results)


RUNS = {"likelihood": {"memory": 80, "lag": 20}, "paper": {"steps_per_epoch": 10}}


def test_a_run_with_most_labels_missing_learns(rule, device, dtype):
    """Seven labels of ten are missing: every task still gets better."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, "adam", rule, settings=QUICK, **RUNS[rule])
    x, labels = make_batch(device, dtype, seed=0, size=80)
    targets = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    labels["reg"] = x @ targets
    labels["bin"] = (x @ targets > 0).to(dtype)
    labels["cls"] = x[:, :3].argmax(1)
    holes = drop(labels, 0.7, 2)
    before = make_losses(net(x), labels), losses_over(net(x), holes)
    for index in range(150):
        rows = torch.arange(index % 10, 80, 10, device=device)
        optimizer.zero_grad()
        optimizer.step(losses_over(net(x[rows]), {name: y[rows] for name, y in holes.items()}))
    after = make_losses(net(x), labels), losses_over(net(x), holes)
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


def evidence_of(optimizer, name):
    """All that is known of a task: of its unit, or its group's rows."""
    memory = optimizer.state_dict()["bayesagg"]["memory"]
    if "units" in memory:
        return next(unit for unit in memory["units"] if unit["names"] == [name])
    full = next(group["full"] for group in memory["groups"] if group["tasks"] == [name])
    wide = full["precision"].expand(len(full["count"]), -1, -1)
    return {**full, "precision": wide}


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_alternating_tasks_gather_their_evidence_alone(name, rule, device):
    """With the network held still, a task's posterior is that of a run on its own data."""
    found = []
    kwargs = {"warmup": 0} if rule == "likelihood" else {"steps_per_epoch": None}
    for names in (list(OUTPUTS), [name]):
        net = plain_net(device)
        base = torch.optim.SGD(net.parameters(), lr=0.0)
        optimizer = wrap(net, base, rule, settings=READOUT, **kwargs)
        alternate(net, optimizer, names, range(9))
        optimizer.end_epoch()
        found.append([evidence_of(optimizer, name), snapshot(net.heads[name])["parameters"]])
    assert_near(*found)


# --- a whole task without labels -----------------------------------------------------------------


SPELLINGS = pytest.mark.parametrize("spelling", ["zero_loss", "targets"])


def no_labels(labels, names):
    gaps = torch.ones(6, dtype=torch.bool, device=labels["reg"].device)
    return {name: without(labels, name, gaps)[name] for name in names}


def state_of(optimizer):
    """Memory and weights, whatever the order in which heads came to have evidence of their own."""
    engine = optimizer.state_dict()["bayesagg"]
    memory = engine["memory"]
    if "units" in memory:
        memory["units"] = {tuple(unit["names"]): unit for unit in memory["units"]}
    return [memory, engine["task_weights"]]


@pytest.mark.parametrize("absent", list(OUTPUTS))
@SPELLINGS
@pytest.mark.parametrize("steps", [0, 1, EPOCH + 1], ids=["first", "pretraining", "after"])
def test_a_task_without_labels_may_have_a_loss(steps, spelling, absent, rule, device):
    """A loss of zero, with or without targets that are all missing, is no loss at all."""
    results = []
    for left_out in (True, False):
        net = plain_net(device)
        optimizer = wrap(net, "sgd", rule, settings=QUICK)
        train(net, optimizer, steps)
        x, labels = make_batch(device, seed=9)
        losses, targets = make_losses(net(x), labels), None
        optimizer.zero_grad()
        if left_out:
            del losses[absent]
        else:
            losses[absent] = losses[absent] * 0
            targets = no_labels(labels, [absent]) if spelling == "targets" else None
        optimizer.step(losses, targets=targets)
        if steps:
            known = state_of(optimizer)
        else:  # whose evidence is shared depends on it, and no number in the steps that follow
            train(net, optimizer, range(1, EPOCH + 2))
            known = [dict(optimizer.task_weights)]
        found = [gradients(net.trunk), snapshot(net)["parameters"], *known]
        assert_finite(found)
        results.append(found)
    assert_near(*results)


@SPELLINGS
@PHASES
@pytest.mark.parametrize(("rule", "kwargs"), RULES.values(), ids=RULES)
def test_a_batch_without_labels_moves_nothing(rule, kwargs, steps, spelling, device):
    net = plain_net(device)
    optimizer = wrap(net, "sgd", rule, **kwargs)
    train(net, optimizer, steps)
    before = snapshot(net)
    x, labels = make_batch(device, seed=9)
    optimizer.zero_grad()
    losses = {name: loss * 0 for name, loss in make_losses(net(x), labels).items()}
    optimizer.step(losses, targets=no_labels(labels, OUTPUTS) if spelling == "targets" else None)
    assert_same(before, snapshot(net), ignore=["gradients"])
    assert not any(p.grad.any() for p in net.trunk.parameters())
    assert_finite(snapshot(net, optimizer))
    again = wrap(plain_net(device), "sgd", rule, **kwargs)
    again.load_state_dict(optimizer.state_dict())

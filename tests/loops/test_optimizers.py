"""Optimizers that are not one for all: closures, one for each tower, groups, frozen heads."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, FOREVER, GRADIENT, OPTIMIZERS, QUICK
from tests.helpers.states import assert_finite, assert_same, difference, snapshot
from tests.helpers.training import make_engine, train, wrap
from tests.loops.clients import CLIENTS, Job, batches_of, lightning, losses_of, state_of

STEPS = 3 * EPOCH
# The paper's rule has no towers.
BUILDS = pytest.mark.parametrize(
    ("rule", "towers"), [("likelihood", False), ("likelihood", True), ("paper", False)]
)
BATCHES = batches_of(EPOCH)


# --- closures ------------------------------------------------------------------------------------


def test_a_closure_in_linear_scalarization_is_the_plain_one(rule):
    """LBFGS evaluates it as often and moves as far, bit for bit."""
    results = []
    for wrapped in (True, False):
        net = plain_net()
        optimizer = OPTIMIZERS["lbfgs"](net.parameters())
        if wrapped:
            optimizer = wrap(net, optimizer, rule, settings=GRADIENT, **FOREVER[rule])
        x, labels = make_batch()
        calls = 0

        def closure(net=net, optimizer=optimizer, wrapped=wrapped, x=x, labels=labels):
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            losses = make_losses(net(x), labels)
            if wrapped:
                return optimizer.backward(losses)
            total = sum(losses.values())
            total.backward()
            return total

        for _ in range(4):
            optimizer.step(closure)
        results.append({"calls": calls, **snapshot(net)["parameters"]})
    assert_same(*results)


@BUILDS
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_with_the_whole_data(line_search, towers, rule):
    """Every evaluation is a batch to the evidence."""
    net = plain_net(towers=towers)
    base = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3, line_search_fn=line_search)
    optimizer = wrap(net, base, rule, settings=GRADIENT)
    x, labels = make_batch(size=48)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(float(optimizer.backward(make_losses(net(x), labels))))
        return torch.tensor(seen[-1])

    for _ in range(8):
        optimizer.step(closure)
    assert len(seen) > 8 and seen[-1] < seen[0]
    assert_finite(snapshot(net, optimizer))


def test_heads_that_lbfgs_does_not_move_are_warned_of(rule):
    """The differences of its gradients are not those of its steps, and some runs diverge."""
    net = plain_net()
    with pytest.warns(UserWarning, match=r"task 'reg'.*LBFGS.*readout='gradient'"):
        wrap(net, "lbfgs", rule)
    if rule == "paper":  # whose classifications are no such heads
        wrap(net, "lbfgs", rule, settings={"reg": GRADIENT["reg"]})
    net.heads.requires_grad_(False)  # nor are frozen ones
    wrap(net, "lbfgs", rule)


@pytest.mark.filterwarnings("ignore")
def test_lightning_hands_lbfgs_its_closure(rule, tmp_path):
    """Which evaluates ``training_step`` again and again, as a closure of one's own does."""
    results = []
    for own in (True, False):
        net = plain_net()
        wrapper = wrap(net, "lbfgs", rule)
        if own:
            lightning(Job(net, wrapper, BATCHES, losses_of, tmp_path, 3))
        else:
            for batch in BATCHES * 3:

                def closure(net=net, wrapper=wrapper, batch=batch):
                    wrapper.zero_grad()
                    return wrapper.backward(losses_of(net, batch))

                wrapper.step(closure)
        results.append(state_of(net, wrapper))
    assert_same(*results)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("client", ["accelerate", "huggingface"])
def test_loops_without_closures_say_so(client, rule, tmp_path):
    net = plain_net()
    wrapper = wrap(net, "lbfgs", rule)
    with pytest.raises(TypeError, match="LBFGS evaluates the model several times a step"):
        CLIENTS[client](Job(net, wrapper, BATCHES, losses_of, tmp_path))


# --- several optimizers --------------------------------------------------------------------------


def parts_of(net):
    return [net.trunk, *net.heads.values()]


@BUILDS
@pytest.mark.parametrize("base", ["momentum", "adam"])
def test_an_optimizer_for_each_part(base, towers, rule):
    """The engine's scalar, and one for the trunk and for each tower: the steps of one for all."""
    results = []
    for several in (True, False):
        net = plain_net(towers=towers)
        engine = make_engine(net, rule, settings=QUICK)
        owned = parts_of(net) if several else [net]
        optimizers = [OPTIMIZERS[base](part.parameters()) for part in owned]
        for index in range(STEPS):
            x, labels = make_batch(seed=index)
            for optimizer in optimizers:
                optimizer.zero_grad()
            engine(make_losses(net(x), labels)).backward()
            for optimizer in optimizers:
                optimizer.step()
            engine.stepped()
        results.append(snapshot(net, engine))
    assert_same(*results)


def test_optimizers_that_take_turns(rule):
    """Trunk and heads in alternate steps; what no optimizer steps on stays, but for what is set."""
    net = plain_net()
    engine = make_engine(net, rule, settings={**QUICK, **GRADIENT})
    optimizers = [OPTIMIZERS["adam"](part.parameters()) for part in (net.trunk, net.heads)]
    for index in range(STEPS):
        x, labels = make_batch(seed=index)
        net.zero_grad()
        engine(make_losses(net(x), labels)).backward()
        other = (net.heads, net.trunk)[index % 2]
        before = snapshot(other)["parameters"]
        optimizers[index % 2].step()
        engine.stepped()
        assert difference(before, snapshot(other)["parameters"]) is None
    assert_finite(snapshot(net, engine))


# --- groups and frozen heads ---------------------------------------------------------------------


def grouped(net, frozen):
    """A group for each part with a rate of its own; a frozen head is in its group or left out."""
    net.heads["bin"].requires_grad_(False)
    groups = [{"params": list(net.trunk.parameters())}]
    for name, head in net.heads.items():
        if name != "bin" or frozen == "in_its_group":
            rate = {"reg": 0.02, "bin": 0.5, "cls": 0.03}[name]
            groups.append({"params": list(head.parameters()), "lr": rate, "weight_decay": 0.1})
    return torch.optim.AdamW(groups, lr=0.01)


@BUILDS
@pytest.mark.parametrize("frozen", ["in_its_group", "left_out"])
def test_groups_with_a_frozen_head(frozen, towers, rule):
    """No rate and no weight decay moves it; its loss reaches the trunk; the others are trained."""
    net = plain_net(towers=towers)
    optimizer = wrap(net, grouped(net, frozen), rule, settings=QUICK)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    start = snapshot(net)["parameters"]
    for index in range(STEPS):
        train(net, optimizer, [index])
        schedule.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, start[name]) == name.startswith("heads.bin"), name
    x, labels = make_batch(seed=99)
    optimizer.zero_grad()
    loss = F.binary_cross_entropy_with_logits(net(x)["bin"], labels["bin"])
    optimizer.backward({"bin": loss})
    assert net.trunk[0].weight.grad.any()
    assert_finite(snapshot(net, optimizer))


def test_a_group_s_rate_of_zero_stops_heads_that_no_posterior_sets(rule):
    """Freezing is ``requires_grad_(False)``: a rate is the optimizer's, not the posterior's."""
    for settings, still in ((GRADIENT, True), ({}, False)):
        net = plain_net()
        groups = [{"params": net.trunk.parameters()}]
        groups.append({"params": net.heads.parameters(), "lr": 0.0})
        base = torch.optim.SGD(groups, lr=0.05)
        optimizer = wrap(net, base, rule, settings={**QUICK, **settings})
        before = net.heads["reg"].weight.detach().clone()
        train(net, optimizer, 2 * EPOCH)
        assert torch.equal(before, net.heads["reg"].weight) == still

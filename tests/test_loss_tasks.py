"""Losses without a head: as a ``LossTask``, weighed by the rule, or passed through as they are."""

import math

import pytest
import torch
from torch import nn

from bayesagg import BayesAgg, BayesAggWrapper, LikelihoodRule, LossTask
from bayesagg.errors import HeadError
from bayesagg.rules import settings
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, PHASES, WIDTH
from tests.helpers.states import assert_finite, assert_same, gradients, snapshot
from tests.helpers.training import make_heads, train, wrap


def other_losses(net, rule, way, **kwargs):
    """A wrapper that takes a loss ``aux`` without a head."""
    heads = make_heads(net, rule)
    if way == "task":
        return wrap(net, "sgd", rule, heads={**heads, "aux": LossTask()}, **kwargs)
    return wrap(net, "sgd", rule, heads=heads, passthrough=("aux",), **kwargs)


WAYS = pytest.mark.parametrize("way", ["task", "passthrough"])


@PHASES
@WAYS
def test_the_gradient_of_a_loss_without_a_head_arrives(way, steps, rule, device, dtype, batch):
    """Beside the heads' at the features, and at parameters of its own."""
    x, labels = batch
    found = []
    for present in (False, True):
        net = plain_net(device, dtype)
        net.extra = nn.Linear(WIDTH, 1).to(x)
        own = {"keep_length": False} if rule == "likelihood" else {}
        optimizer = other_losses(net, rule, way, **own)
        train(net, optimizer, steps)
        h = net.trunk(x)
        out = {name: head(h) for name, head in net.heads.items()}
        losses = make_losses(out, labels)
        aux = net.extra(h).exp().mean()
        own = torch.autograd.grad(
            aux, [*net.trunk.parameters(), *net.extra.parameters()], retain_graph=True
        )
        optimizer.zero_grad()
        optimizer.step({**losses, "aux": aux} if present else losses)
        found.append(gradients(net))
    # Over its running mean, which in its first step is its value.
    scaled = way == "task" and rule == "likelihood" and steps == 4
    factor = 1 / aux.detach() if scaled else 1.0
    names = [n for n, _ in net.named_parameters() if n.startswith(("trunk", "extra"))]
    for name, gradient in zip(names, own, strict=True):
        before = found[0][name] if name.startswith("trunk") else 0.0
        torch.testing.assert_close(found[1][name], before + factor * gradient)


@WAYS
def test_a_step_of_losses_without_a_head_alone(way, rule, device, dtype, batch):
    x, _ = batch
    net = plain_net(device, dtype)
    optimizer = other_losses(net, rule, way)
    train(net, optimizer, EPOCH + 1)
    heads = snapshot(net.heads)["parameters"]
    optimizer.zero_grad()
    optimizer.step({"aux": net.trunk(x).square().mean()})
    assert net.trunk[0].weight.grad.any()
    assert_same(heads, snapshot(net.heads)["parameters"])
    train(net, optimizer, range(EPOCH + 1, EPOCH + 3))
    assert_finite(snapshot(net, optimizer))


def test_the_unit_of_a_loss_task_does_not_matter(device, dtype):
    """Of the default rule, which divides it by its running mean; a passthrough is as it comes."""
    found = []
    for unit in (1.0, 1000.0):
        net = plain_net(device, dtype)
        optimizer = other_losses(net, "likelihood", "task", warmup=0, keep_length=False)
        for index in range(5):
            x, labels = make_batch(device, dtype, seed=index)
            h = net.trunk(x)
            losses = make_losses({n: head(h) for n, head in net.heads.items()}, labels)
            optimizer.zero_grad()
            optimizer.step({**losses, "aux": unit * (1 + h.square().mean())})
        found.append(snapshot(net)["parameters"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("sign", [0.0, -1.0])
@PHASES
def test_a_loss_task_that_is_not_positive_is_taken_as_it_is(sign, steps, rule, device, dtype):
    net = plain_net(device, dtype)
    optimizer = other_losses(net, rule, "task")
    free = nn.Parameter(torch.ones(2, device=device, dtype=dtype))
    for index in range(steps):
        x, labels = make_batch(device, dtype, seed=index)
        losses = make_losses(net(x), labels)
        free.grad = None
        optimizer.zero_grad()
        optimizer.step({**losses, "aux": free.sum() + (sign - 2)})
        assert_finite(snapshot(net, optimizer))
        assert bool((free.grad > 0).all()) and bool(free.grad.isfinite().all())


def test_targets_of_losses_without_a_head_are_of_no_use(rule, device, dtype, batch):
    x, labels = batch
    results = []
    for more in ({}, {"aux": torch.zeros(3, device=device)}):
        net = plain_net(device, dtype)
        optimizer = other_losses(net, rule, "task")
        losses = {**make_losses(net(x), labels), "aux": 1 + net.trunk(x).square().mean()}
        optimizer.step(losses, targets={**labels, **more})
        results.append(snapshot(net, optimizer))
    assert_same(*results)


def two_losses(net, x):
    """Of one network, neither with a head."""
    h = net.trunk(x)
    return {"long": 1 + h.square().mean(), "near": 100 * (h - 1).abs().mean()}


@pytest.mark.parametrize("lag", [1, 20, None])
def test_losses_without_heads_alone_are_divided_by_their_running_means(
    lag, device, dtype, monkeypatch
):
    """The default rule's only: the paper's weighs heads. The first step has its own values."""
    monkeypatch.setattr(settings, "_LONG", 1)  # that it grows within these steps
    rule = LikelihoodRule(warmup=0, lag=lag, keep_length=False)
    net = plain_net(device, dtype)
    engine = BayesAgg(None, {"long": LossTask(), "near": LossTask()}, rule=rule)
    values = []
    for index in range(6):
        losses = two_losses(net, make_batch(device, dtype, seed=index)[0])
        now = torch.stack([*losses.values()]).detach().double()
        past = torch.stack(values or [now])
        lags = [lag or max(1, step / 2) for step in range(1, len(past) + 1)]
        later = [math.prod(1 - 1 / own for own in lags[i + 1 :]) for i in range(len(past))]
        shares = torch.tensor([a / b for a, b in zip(later, lags, strict=True)]).to(past)[:, None]
        means = (shares * past).sum(0) / shares.sum(0)
        values.append(now)

        own = list(net.trunk.parameters())
        each = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses.values()]
        net.zero_grad()
        engine(losses).backward()
        for parameter, *gradients_of_losses in zip(own, *each, strict=True):
            pairs = zip(gradients_of_losses, means, strict=True)
            torch.testing.assert_close(parameter.grad, sum(g / m.to(g) for g, m in pairs))
        shares = torch.cat([*engine.task_weights.values()])
        torch.testing.assert_close(shares, (1 / means) / (1 / means).sum())
        with torch.no_grad():
            for parameter in own:
                parameter -= 0.01 * parameter.grad


@pytest.mark.parametrize(
    ("base", "keeps", "times"),
    [
        (torch.optim.SGD, True, lambda loss: 1.0),
        (torch.optim.SGD, False, lambda loss: 1 / loss),
        (torch.optim.Adam, True, lambda loss: 5.0),
    ],
    ids=["as it is", "over its mean", "at most five times"],
)
def test_the_length_of_one_loss_without_a_head(base, keeps, times, device, dtype):
    """The default rule's: that of the plain gradient, or five times it where it does not matter."""
    net = plain_net(device, dtype)
    rule = LikelihoodRule(warmup=3, keep_length=keeps)
    optimizer = base(net.parameters(), lr=1e-4)
    optimizer = BayesAggWrapper(optimizer, None, {"only": LossTask()}, rule=rule)
    factors = []
    for index in range(8):
        loss = 1e-3 * two_losses(net, make_batch(device, dtype, seed=index)[0])["long"]
        (own,) = torch.autograd.grad(loss, net.trunk[0].weight, retain_graph=True)
        optimizer.zero_grad()
        optimizer.step({"only": loss})
        factors.append((net.trunk[0].weight.grad.norm() / own.norm()).item())
    assert factors[:3] == pytest.approx([1.0] * 3)
    assert factors[3:] == pytest.approx([times(loss.item())] * 5, rel=0.1)


def test_losses_that_cancel_are_trained(device, dtype):
    """Log-densities may be negative: a sum of zero is not a gradient of zero."""
    net = plain_net(device, dtype)
    base, tasks = torch.optim.SGD(net.parameters(), lr=1e-4), {"up": LossTask(), "down": LossTask()}
    optimizer = BayesAggWrapper(base, None, tasks, rule=LikelihoodRule(warmup=2))
    for index in range(6):
        loss = two_losses(net, make_batch(device, dtype, seed=index)[0])["near"]
        losses = {"up": loss, "down": 1e-3 * loss - 1.001 * loss.detach()}
        (own,) = torch.autograd.grad(sum(losses.values()), net.trunk[0].weight, retain_graph=True)
        optimizer.zero_grad()
        optimizer.step(losses)
        assert net.trunk[0].weight.grad.norm() > 1e-3 * own.norm()


def test_losses_without_heads_alone_resume(device, dtype):
    ends = []
    for stop in (None, 60):
        net, steps = plain_net(device, dtype), 0
        tasks = {"long": LossTask(), "near": LossTask()}
        optimizer = BayesAggWrapper(torch.optim.Adam(net.parameters()), None, tasks)
        while steps < 70:  # beyond the warm-up
            if steps == stop:
                saved = optimizer.state_dict()
                optimizer = BayesAggWrapper(torch.optim.Adam(net.parameters()), None, tasks)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            optimizer.step(two_losses(net, make_batch(device, dtype, seed=steps)[0]))
            steps += 1
        ends.append(snapshot(net, optimizer))
    assert_same(*ends)


def test_without_heads_there_is_nothing_to_predict_with(device, dtype, batch):
    net = plain_net(device, dtype)
    engine = BayesAgg(None, {"long": LossTask()})
    for data in (None, [batch]):
        with pytest.raises(HeadError, match=r"nothing but LossTask.*no posterior"):
            engine.predictor(net, data)


def test_the_paper_s_rule_needs_a_head(device, dtype):
    with pytest.raises(HeadError, match=r"nothing but LossTask.*default rule"):
        BayesAgg(None, {"long": LossTask()}, rule="paper")


@PHASES
def test_weights_of_losses_without_heads_are_what_multiplies_them(
    steps, rule, device, dtype, batch
):
    """As shares of the sum over all tasks; they are uniform while training is that of the sum."""
    x, labels = batch
    net = plain_net(device, dtype)
    optimizer = other_losses(net, rule, "task")
    free = nn.Parameter(torch.ones((), device=device, dtype=dtype))
    for index in range(steps + 1):
        optimizer.zero_grad()
        losses = make_losses(net(make_batch(device, dtype, seed=index)[0]), labels)
        optimizer.step({**losses, "aux": 3 * free})
    weights = optimizer.task_weights
    assert weights["aux"].shape == (1,)
    torch.testing.assert_close(sum(w.sum() for w in weights.values()).item(), 1.0)
    if rule == "paper" and steps > 1:  # sums of its weights over the tasks are their number
        outputs = sum(len(w) for name, w in weights.items() if name != "aux")
        torch.testing.assert_close(weights["aux"].item(), 1 / (1 + outputs))
    optimizer.step(make_losses(net(x), labels))
    assert (optimizer.task_weights["aux"].item() == 0.0) == (steps > 1)  # not in that step

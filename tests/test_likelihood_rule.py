"""``rule="likelihood"`` through the engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.errors import CheckpointError, HeadError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.age, self.sick, self.kind = nn.Linear(8, 2), nn.Linear(8, 1), nn.Linear(8, 3)

    def losses(self, x, y, unit=1.0):
        h = self.trunk(x)
        age, sick, kind = y
        return {
            "age": F.mse_loss(self.age(h), unit * age),
            "sick": F.binary_cross_entropy_with_logits(self.sick(h), sick),
            "kind": F.cross_entropy(self.kind(h), kind),
        }


def build(device, seed=0, pretrain_epochs=0, **kwargs):
    torch.manual_seed(seed)
    net = Net().double().to(device)
    heads = {
        "age": RegressionHead(net.age, **kwargs.pop("regression", {})),
        "sick": BinaryHead(net.sick, **kwargs.pop("classes", {})),
        "kind": MulticlassHead(net.kind),
    }
    return net, BayesAgg(net.trunk, heads, pretrain_epochs=pretrain_epochs, **kwargs)


def batch(device, n=30, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).to(device)
    age = x[:, :2] + 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64).to(device)
    return x, (age, (x[:, 2:3] > 0).double(), x[:, :3].argmax(1))


def trunk_gradients(net):
    return [p.grad.clone() for p in net.trunk.parameters()]


CLASSES = ("sick", "kind")


def gradient_of(objective, net):
    gradients = torch.autograd.grad(objective, list(net.trunk.parameters()))
    net.zero_grad()
    return gradients


def test_classification_gradients_are_divided_by_the_running_mean_of_the_loss(device):
    net, engine = build(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    total, weight = dict.fromkeys(CLASSES, 0.0), 0.0
    for seed in range(4):
        x, y = batch(device, seed=seed)
        values = {name: float(net.losses(x, y)[name].detach()) for name in CLASSES}
        # The mean over the steps before; in the first step that of the batch itself.
        scale = {name: total[name] / weight if weight else values[name] for name in CLASSES}
        expected = gradient_of(sum(net.losses(x, y)[n] / scale[n] for n in CLASSES), net)
        optimizer.zero_grad()
        losses = net.losses(x, y)
        engine.backward({name: losses[name] for name in CLASSES})
        for mine, theirs in zip(net.trunk.parameters(), expected, strict=True):
            torch.testing.assert_close(mine.grad, theirs)
        shares = torch.tensor([1 / scale[name] for name in CLASSES], dtype=torch.float64)
        mine = torch.cat([engine.task_weights[name] for name in CLASSES])
        torch.testing.assert_close(mine.cpu(), shares / shares.sum())
        optimizer.step()
        total = {name: 0.99 * total[name] + 0.01 * values[name] for name in CLASSES}
        weight = 0.99 * weight + 0.01


def test_heads_have_the_gradient_of_their_own_loss(device):
    net, engine = build(device)
    x, y = batch(device)
    sick = net.losses(x, y)["sick"]
    (expected,) = torch.autograd.grad(sick, [net.sick.weight])
    engine.backward(net.losses(x, y))
    torch.testing.assert_close(net.sick.weight.grad, expected)


def test_a_perfect_fit_has_a_bounded_weight(device):
    net, engine = build(device)
    with torch.no_grad():
        net.sick.weight.zero_()
        net.sick.bias.fill_(30.0)
    x, (age, sick, kind) = batch(device)
    y = (age, torch.ones_like(sick), kind)
    expected = gradient_of(net.losses(x, y)["sick"] * 100, net)
    engine.backward({"sick": net.losses(x, y)["sick"]})
    for mine, theirs in zip(net.trunk.parameters(), expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs)


def test_classification_needs_no_posterior_unless_it_is_read_out_or_weighted(device):
    x, y = batch(device)
    for settings, width in (({}, 0), ({"readout": "posterior"}, 9), ({"s": 0.5}, 9)):
        net, engine = build(device, classes=settings)
        engine.backward(net.losses(x, y))
        engine.end_epoch()
        assert engine._blocks[1].full.precision.shape == (1, width, width)


def test_many_classes_fit(device):
    module = torch.nn.Linear(512, 1000, device=device)
    BayesAgg(None, {"kind": MulticlassHead(module)})
    with pytest.raises(HeadError, match="rule='likelihood'"):
        BayesAgg(None, {"kind": MulticlassHead(module)}, rule="paper")


def test_the_unit_of_a_label_does_not_matter(device):
    found = []
    for unit in (1.0, 1000.0):
        net, engine = build(device)
        with torch.no_grad():  # the same problem in other units, heads included
            net.age.weight.mul_(unit)
            net.age.bias.mul_(unit)
        x, y = batch(device)
        for _ in range(3):
            net.zero_grad()
            engine.backward(net.losses(x, y, unit))
        found.append(trunk_gradients(net))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_exponents_weigh_the_tasks_further(device):
    x, y = batch(device)
    found = []
    for s in (0.0, 0.5):
        net, engine = build(device, regression={"s": s}, classes={"s": s})
        engine.backward(net.losses(x, y))
        found.append(torch.cat(list(engine.task_weights.values())))
        torch.testing.assert_close(found[-1].sum(), torch.ones_like(found[-1].sum()))
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_a_subset_of_the_data_changes_the_posterior_only(device):
    x, y = batch(device, n=600)
    net, engine = build(device, max_data=600)
    engine.backward(net.losses(x, y))
    whole = trunk_gradients(net)
    net, engine = build(device, max_data=250)
    engine.backward(net.losses(x, y))
    for one, other in zip(whole, trunk_gradients(net), strict=True):
        assert not torch.equal(one, other)
        assert float((one - other).norm() / one.norm()) < 0.25


def test_a_state_continues_in_the_same_bits(device):
    ends = []
    for stop in (False, True):
        net, engine = build(device, pretrain_epochs=1)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for step in range(9):
            if stop and step == 5:
                state = copy.deepcopy(
                    (net.state_dict(), engine.state_dict(), optimizer.state_dict())
                )
                net, engine = build(device, seed=3, pretrain_epochs=1)
                optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
                net.load_state_dict(state[0])
                engine.load_state_dict(state[1])
                optimizer.load_state_dict(state[2])
            x, y = batch(device, seed=step)
            optimizer.zero_grad()
            engine.backward(net.losses(x, y))
            optimizer.step()
            if step % 3 == 2:
                engine.end_epoch()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)


def test_training_with_tasks_of_other_units_learns_all(device):
    net, _ = build(device)
    heads = {
        "age": RegressionHead(net.age),
        "sick": BinaryHead(net.sick),
        "kind": MulticlassHead(net.kind),
    }
    optimizer = BayesAggWrapper(
        torch.optim.Adam(net.parameters(), lr=1e-2),
        net.trunk,
        heads,
        steps_per_epoch=10,
    )
    x, y = batch(device, n=200)
    start = {name: float(loss.detach()) for name, loss in net.losses(x, y, 50.0).items()}
    for _ in range(300):
        optimizer.zero_grad()
        optimizer.step(net.losses(x, y, 50.0))
    end = {name: float(loss.detach()) for name, loss in net.losses(x, y, 50.0).items()}
    assert all(end[name] < 0.3 * start[name] for name in start)


def test_full_covariances_are_refused(device):
    with pytest.raises(ValueError, match="rule='paper'"):
        build(device, covariance="full")


def test_a_state_of_the_other_rule_is_refused(device):
    x, y = batch(device)
    net, engine = build(device, rule="paper")
    engine.backward(net.losses(x, y))
    state = engine.state_dict()
    _, other = build(device)
    with pytest.raises(CheckpointError, match="rule='paper'"):
        other.load_state_dict(state)

"""``rule="likelihood"`` through the engine."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.presets import LIKELIHOOD


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
        "age": RegressionHead(net.age, **{**LIKELIHOOD.regression, **kwargs.pop("regression", {})}),
        "sick": BinaryHead(net.sick, **{**LIKELIHOOD.binary, **kwargs.pop("classes", {})}),
        "kind": MulticlassHead(net.kind, **LIKELIHOOD.multiclass),
    }
    engine = BayesAgg(
        net.trunk, heads, pretrain_epochs=pretrain_epochs, **LIKELIHOOD.wrapper, **kwargs
    )
    return net, engine


def batch(device, n=30, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64).to(device)
    age = x[:, :2] + 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64).to(device)
    return x, (age, (x[:, 2:3] > 0).double(), x[:, :3].argmax(1))


def trunk_gradients(net):
    return [p.grad.clone() for p in net.trunk.parameters()]


def test_classification_has_its_ordinary_gradient(device):
    net, engine = build(device)
    x, y = batch(device)
    losses = net.losses(x, y)
    del losses["age"]
    twin = copy.deepcopy(net)
    engine.backward(losses)
    others = twin.losses(x, y)
    (others["sick"] + others["kind"]).backward()
    for mine, plain in zip(net.trunk.parameters(), twin.trunk.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad)


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


def test_without_exponents_all_weights_are_alike_and_with_them_not(device):
    x, y = batch(device)
    net, engine = build(device)
    engine.backward(net.losses(x, y))
    for weights in engine.task_weights.values():
        torch.testing.assert_close(weights, torch.full_like(weights, 0.25))
    net, engine = build(device, regression={"s": 0.5}, classes={"s": 0.5})
    engine.backward(net.losses(x, y))
    assert float(engine.task_weights["age"].sum() - 0.5) ** 2 > 1e-6


def test_a_subset_of_the_data_changes_the_posterior_only(device):
    x, y = batch(device, n=60)
    net, engine = build(device, max_data=60)
    engine.backward(net.losses(x, y))
    whole = trunk_gradients(net)
    net, engine = build(device, max_data=25)
    engine.backward(net.losses(x, y))
    for one, other in zip(whole, trunk_gradients(net), strict=True):
        assert not torch.equal(one, other)
        assert float((one - other).norm() / one.norm()) < 0.5


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
        "age": RegressionHead(net.age, **LIKELIHOOD.regression),
        "sick": BinaryHead(net.sick),
        "kind": MulticlassHead(net.kind),
    }
    optimizer = BayesAggWrapper(
        torch.optim.Adam(net.parameters(), lr=1e-2),
        net.trunk,
        heads,
        steps_per_epoch=10,
        **LIKELIHOOD.wrapper,
    )
    x, y = batch(device, n=200)
    start = {name: float(loss.detach()) for name, loss in net.losses(x, y, 50.0).items()}
    for _ in range(300):
        optimizer.zero_grad()
        optimizer.step(net.losses(x, y, 50.0))
    end = {name: float(loss.detach()) for name, loss in net.losses(x, y, 50.0).items()}
    assert all(end[name] < 0.3 * start[name] for name in start)


def test_full_covariances_are_refused(device):
    with pytest.raises(ValueError, match="diagonal"):
        build(device, covariance="full")

"""Losses without a head that depend on a head's weights: forces, the derivatives of an energy."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BinaryHead, RegressionHead
from tests.helpers.settings import EPOCH, RULES


class Potential(nn.Module):
    """An energy of positions, its derivative, and whether a bond holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.energy, self.bond = nn.Linear(8, 1), nn.Linear(8, 1)

    def losses(self, x, labels):
        x = x.clone().requires_grad_()
        h = self.trunk(x)
        energy = self.energy(h)
        (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        bond = F.binary_cross_entropy_with_logits(self.bond(h), labels["bond"])
        losses = {"energy": F.mse_loss(energy, labels["energy"]), "bond": bond}
        return losses, F.mse_loss(-slope, labels["forces"])


def start(rule, **settings):
    net = Potential()
    heads = {"energy": RegressionHead(net.energy, **settings), "bond": BinaryHead(net.bond)}
    kwargs = {"steps_per_epoch": EPOCH} if rule == "paper" else {}
    return net, BayesAgg(None, heads, rule=RULES[rule], passthrough=("extra",), **kwargs)


def batch(seed=0):
    torch.manual_seed(seed)
    x = torch.randn(12, 3)
    labels = {"energy": x.square().sum(1, keepdim=True), "forces": -2 * x}
    return x, {**labels, "bond": (x[:, :1] > 0).float()}


def step(net, engine, extra, seed=0):
    """The gradient of a plain backward pass at the head, and ours."""
    losses, forces = net.losses(*batch(seed))
    other = {"forces": forces, "penalty": net.energy.weight.square().sum()}
    found = []
    for total in (lambda all_losses: sum(all_losses.values()), engine):
        net.zero_grad()
        total({**losses, **({"extra": other[extra]} if extra else {})}).backward(retain_graph=True)
        found.append(net.energy.weight.grad)
    return found


@pytest.mark.parametrize("extra", ["forces", "penalty"])
def test_what_has_no_effect_is_said_once(extra, rule):
    """At the loss's first step, which need not be the head's."""
    net, engine = start(rule)
    step(net, engine, None)
    with pytest.warns(UserWarning, match=r"'energy'.*in the loss 'extra'.*readout='gradient'") as w:
        for seed in range(2 * EPOCH):
            step(net, engine, extra, seed)
    assert len(w) == 1


def test_a_head_with_a_gradient_of_its_own_has_that_of_the_forces_too(rule):
    net, engine = start(rule, readout="gradient")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2 * EPOCH):
            plain, ours = step(net, engine, "forces", seed)
            torch.testing.assert_close(ours, plain)


def test_losses_of_outputs_and_features_are_no_concern(rule):
    """Their gradient goes through the outputs, where it is seen, or past the heads."""
    net, engine = start(rule)
    x, labels = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses, _ = net.losses(x, labels)
        extra = net.trunk(x).square().mean()
        engine({**losses, "extra": extra}).backward()

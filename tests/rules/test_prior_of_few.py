"""The prior of the default rule where there are fewer data than 20 a weight.

Its γ is then smaller in proportion, unless somebody has set it. The paper's rule has one γ for any
number of data.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, BinaryHead, LikelihoodRule, RegressionHead

WIDTH, SIZE, GAMMA, OWN = 3, 20, 0.05, 0.3
ENOUGH = 20 * (WIDTH + 1)
EYE = torch.eye(WIDTH + 1, dtype=torch.float64)


def data_of(size, missing):
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    labels = {"a": y[:, :2].clone(), "b": y[:, 2:3], "bin": (y[:, 3:] > 0).double()}
    if missing:
        labels["a"][::2, 0] = math.nan
    return h, labels


class Outputs(nn.Module):
    """Heads on features that nobody trains."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 1)
        self.bin = nn.Linear(WIDTH, 1)

    def forward(self, h):
        return {name: module(h) for name, module in self.named_children()}

    def weights(self, name):
        """Of a head with its bias, ``[o, D]``."""
        head = getattr(self, name)
        return torch.cat([head.weight, head.bias[:, None]], 1).detach()


def start(rule=None, own=None):
    torch.manual_seed(0)
    net = Outputs().double()
    heads = {
        "a": RegressionHead(net.a),
        "b": RegressionHead(net.b, prior_variance=own),
        "bin": BinaryHead(net.bin),
    }
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    return net, BayesAggWrapper(base, None, heads, rule=rule or LikelihoodRule())


def step(net, optimizer, h, labels):
    losses = {}
    for name, out in net(h).items():
        known = ~labels[name].isnan()
        loss = F.binary_cross_entropy_with_logits if name == "bin" else F.mse_loss
        losses[name] = loss(out[known], labels[name][known])
    optimizer.zero_grad()
    optimizer.step(losses, targets=labels)


def shares(units):
    """Of 20 data a weight, as counted, by output."""
    found = {}
    for unit in units:
        sizes = [n / ENOUGH for n in unit.repeats.lengths(ENOUGH)] if unit.repeats else [1.0]
        found |= {name: sizes if unit.wide else sizes * 2 for name in unit.names}
    return found


def written_out(units, before, share, given):
    """Posterior means of every output, from evidence after a step and scales before it."""
    means = {}
    for unit in units:
        column = 0
        for name in unit.names:
            rows = []
            for o in range(2 if name == "a" else 1):
                group, row = (o, 0) if unit.wide else (0, column)
                ridge = 4 / GAMMA  # a curvature of a quarter
                if name != "bin":
                    total, level = before[name][group, :2, 0 if unit.wide else column]
                    own = given.get(name)
                    ridge = total / level / (own or GAMMA * share[name][o])
                gram, eta = unit.gram[group], unit.shift[group, row]
                rows.append(torch.linalg.solve(gram + ridge * EYE, eta))
                column += 1
            means[name] = torch.stack(rows)
    return means


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("given", [{}, {"b": OWN}, {"a": OWN, "b": OWN}], ids=str)
def test_the_heads_are_as_written_out(given, missing):
    """γ of a regression is multiplied by its share of 20 data a weight, if nobody has set it."""
    rule = LikelihoodRule(prior_variance=OWN) if "a" in given else LikelihoodRule()
    net, optimizer = start(rule, given.get("b"))
    h, labels = data_of(SIZE, missing)
    for _ in range(60):
        before = {n: u.scale for u in optimizer.engine._memory.units for n in u.names}
        step(net, optimizer, h, labels)
    units = optimizer.engine._memory.units
    share = shares(units)
    full = [SIZE / ENOUGH] * 2
    assert share["a"] == pytest.approx([full[0] / 2, full[1]] if missing else full, rel=0.15)
    expected = written_out(units, before, share, given)
    for name in ("a", "b"):
        own = net.weights(name)
        torch.testing.assert_close(own, expected[name], rtol=1e-9, atol=1e-12)
    if "a" not in given:
        own = net.weights("bin")
        torch.testing.assert_close(own, expected["bin"], rtol=1e-9, atol=1e-12)


def known(predictor, name):
    """Mean and the inverse, per unit of noise, of the first output of a head."""
    posterior = dict(predictor._named())[name]
    vectors, variances = posterior.vectors[0], posterior.variances[0, 0]
    return posterior.mean[0], (vectors * variances) @ vectors.mT / posterior.noise[0]


@pytest.mark.parametrize("given", [None, OWN])
def test_predictions_know_the_same_prior(given):
    """From the evidence of training, and from data that are passed again."""
    net, optimizer = start(None if given is None else LikelihoodRule(prior_variance=given))
    h, labels = data_of(SIZE, False)
    for _ in range(200):  # until the evidence is what it stays
        step(net, optimizer, h, labels)
    (unit,) = [unit for unit in optimizer.engine._memory.units if "a" in unit.names]
    total, level = unit.scale[0, :2, 0]
    gamma = given or GAMMA * shares([unit])["a"][0]
    mean, inverse = known(optimizer.predictor(net), "a")
    expected = torch.linalg.inv(unit.gram[0] + total / level / gamma * EYE)
    torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-12)
    own = net.weights("a")[0]
    torch.testing.assert_close(mean, own, rtol=1e-6, atol=1e-9)

    refit = optimizer.predictor(net, [(h, labels)])
    mean, inverse = known(refit, "a")
    noise = dict(refit._named())["a"].noise[0]
    ones = F.pad(h, (0, 1), value=1.0)
    y = labels["a"][:, 0]
    ridge = noise / ((given or GAMMA * SIZE / ENOUGH) * y.square().mean())
    expected = torch.linalg.inv(ones.mT @ ones + ridge * EYE)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(mean, expected @ (ones.mT @ y), rtol=1e-6, atol=1e-9)


def test_enough_data_have_the_prior_as_it_is():
    net, optimizer = start()
    h, labels = data_of(2 * ENOUGH, False)
    for _ in range(8):
        for rows in torch.arange(len(h)).split(SIZE):
            before = {n: u.scale for u in optimizer.engine._memory.units for n in u.names}
            step(net, optimizer, h[rows], {n: y[rows] for n, y in labels.items()})
    expected = written_out(optimizer.engine._memory.units, before, {"a": [1, 1], "b": [1]}, {})
    for name, mean in expected.items():
        own = net.weights(name)
        torch.testing.assert_close(own, mean, rtol=1e-9, atol=1e-12)

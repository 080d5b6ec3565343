"""The prior of the default rule where there are fewer data than 20 a weight, or features are small.

Its γ is smaller in proportion to the data, and larger where the mean square of the features is
below 0.1, unless somebody has set it. The paper's rule has one γ for all.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, BinaryHead, LikelihoodRule, RegressionHead

WIDTH, SIZE, GAMMA, OWN = 3, 20, 0.05, 0.3
SMALL = [1.0, 0.2, 1e-3]  # what features are multiplied by
ENOUGH = 20 * (WIDTH + 1)
EYE = torch.eye(WIDTH + 1, dtype=torch.float64)


def data_of(size, missing, factor=1.0):
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    labels = {"a": y[:, :2].clone(), "b": y[:, 2:3], "bin": (y[:, 3:] > 0).double()}
    if missing:
        labels["a"][::2, 0] = math.nan
    return factor * h, labels


class Outputs(nn.Module):
    """Heads on features that nobody trains."""

    def __init__(self, bias=True):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2, bias), nn.Linear(WIDTH, 1, bias)
        self.bin = nn.Linear(WIDTH, 1, bias)

    def forward(self, h):
        return {name: module(h) for name, module in self.named_children()}

    def weights(self, name):
        """Of a head with its bias, ``[o, D]``."""
        head = getattr(self, name)
        return torch.cat([head.weight, head.bias[:, None]], 1).detach()


def start(rule=None, own=None, bias=True):
    torch.manual_seed(0)
    net = Outputs(bias).double()
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


def of_features(squares, data):
    """What ridges are multiplied by, from the squares of all features, ``[d]``, of some data."""
    return (squares.mean() / data / 0.1).clamp(max=1.0)


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
                if name not in given:
                    squares = gram.diagonal()
                    ridge = ridge * of_features(squares[:-1], squares[-1])
                rows.append(torch.linalg.solve(gram + ridge * EYE, eta))
                column += 1
            means[name] = torch.stack(rows)
    return means


@pytest.mark.parametrize("factor", SMALL)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("given", [{}, {"b": OWN}, {"a": OWN, "b": OWN}], ids=str)
def test_the_heads_are_as_written_out(given, missing, factor):
    """γ of a regression is multiplied by its share of 20 data a weight, if nobody has set it.

    That of every head by a tenth over the mean square of its features, if that is less.
    """
    rule = LikelihoodRule(prior_variance=OWN) if "a" in given else LikelihoodRule()
    net, optimizer = start(rule, given.get("b"))
    h, labels = data_of(SIZE, missing, factor)
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


@pytest.mark.parametrize("factor", SMALL)
@pytest.mark.parametrize("given", [None, OWN])
def test_predictions_know_the_same_prior(given, factor):
    """From the evidence of training, and from data that are passed again."""
    net, optimizer = start(None if given is None else LikelihoodRule(prior_variance=given))
    h, labels = data_of(SIZE, False, factor)
    for _ in range(200):  # until the evidence is what it stays
        step(net, optimizer, h, labels)
    (unit,) = [unit for unit in optimizer.engine._memory.units if "a" in unit.names]
    total, level = unit.scale[0, :2, 0]
    gamma = given or GAMMA * shares([unit])["a"][0]
    if given is None:
        squares = unit.gram[0].diagonal()
        gamma = gamma / of_features(squares[:-1], squares[-1])
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
    few = GAMMA * SIZE / ENOUGH / of_features(h.square().sum(0), SIZE)
    ridge = noise / ((given or few) * y.square().mean())
    expected = torch.linalg.inv(ones.mT @ ones + ridge * EYE)
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(mean, expected @ (ones.mT @ y), rtol=1e-6, atol=1e-9)

    weights = dict(refit._named())["bin"].mean[0]  # at the mode of the loss and the prior
    share = 1.0 if given else of_features(h.square().sum(0), SIZE)
    pull = ones.mT @ ((ones @ weights).sigmoid() - labels["bin"][:, 0])
    torch.testing.assert_close(pull, -weights * share / (given or GAMMA), rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("missing", [False, True])
def test_the_unit_of_small_features_has_no_say(missing):
    """Without a bias heads say the same of features that are a tenth as large."""
    outputs = []
    for factor in (0.1, 0.01):
        net, optimizer = start(LikelihoodRule(warmup=0), bias=False)
        h, labels = data_of(SIZE, missing, factor)
        with torch.no_grad():
            for weight in net.parameters():
                weight.zero_()
        for _ in range(20):
            step(net, optimizer, h, labels)
        outputs.append(net(h))
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-10)


def test_no_label_yet_and_features_of_zeros():
    """There is nothing that their size could be told from."""
    net, optimizer = start(LikelihoodRule(warmup=0))
    h, labels = data_of(SIZE, False, factor=0.0)
    before = net.weights("b")
    for _ in range(3):
        out = net(h)
        losses = {"a": F.mse_loss(out["a"], labels["a"]), "b": 0 * out["b"].sum()}
        optimizer.zero_grad()
        optimizer.step(losses, targets={"a": labels["a"], "b": math.nan * labels["b"]})
    torch.testing.assert_close(net.weights("b"), before)
    assert all(bool(p.isfinite().all()) for p in net.parameters())

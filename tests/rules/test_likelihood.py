"""The default rule against its formulas, written out datum by datum."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import (
    BayesAgg,
    BinaryHead,
    LikelihoodRule,
    MulticlassHead,
    RegressionHead,
)
from bayesagg.rules import settings
from tests.helpers.data import LOSSES, without

D, N = 4, 9
RULE = LikelihoodRule(memory=30, warmup=0, lag=5, prior_variance=0.2, keep_length=False)
RECENT, LONG = 2, 3  # lags of a rule that has none set, here
KINDS = {"reg": (RegressionHead, 2), "bin": (BinaryHead, 1), "cls": (MulticlassHead, 3)}


def network(kinds, bias=True, seed=0, classes=3):
    torch.manual_seed(seed)
    outputs = {k: classes if k == "cls" else KINDS[k][1] for k in kinds}
    modules = nn.ModuleDict({k: nn.Linear(D, o, bias) for k, o in outputs.items()}).double()
    return modules, {k: KINDS[k][0](modules[k]) for k in kinds}


def batch(step, kinds, n=N, classes=3):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_()
    labels = {}
    for kind in kinds:
        outputs = classes if kind == "cls" else KINDS[kind][1]
        y = torch.randn(n, outputs, generator=generator, dtype=torch.float64)
        labels[kind] = {"reg": y, "bin": (y > 0).double(), "cls": y.argmax(1)}[kind]
    return x, labels


class Reference:
    """One head: evidence, scale and gradient of math.md, a datum at a time."""

    def __init__(self, kind, module, rule):
        self.kind, self.module, self.rule = kind, module, rule
        width = D + (module.bias is not None)
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.shift = torch.zeros(width, module.out_features, dtype=torch.float64)
        # Of the noise, and of the scale that the task is weighed by, which may go back further.
        self.sums = torch.zeros(2, 3, module.out_features if kind != "cls" else 1).double()
        self.steps = 0

    def weights(self):
        w = self.module.weight.detach()
        return (w if self.module.bias is None else torch.cat([w, self.module.bias[:, None]], 1)).T

    def step(self, x, y):
        rule, w = self.rule, self.weights()
        ones = [] if self.module.bias is None else [torch.ones(len(x), 1).double()]
        h = torch.cat([x.detach(), *ones], 1)
        fade = math.exp(-len(h) / rule.memory)
        self.gram = fade * self.gram + h.T @ h
        z = h @ w
        if self.kind == "reg":
            self.shift = fade * self.shift + h.T @ y
            return self.regression(h, y, z, w)
        classes = z.shape[1]
        c = 0.25 if self.kind == "bin" else 0.5 if classes <= 16 else 0.1
        p = z.sigmoid() if self.kind == "bin" else z.softmax(1)
        target = y if self.kind == "bin" else F.one_hot(y, classes).double()
        # In the form of math.md: the bound expanded at the head's weights.
        self.shift = fade * self.shift + c * h.T @ h @ w - h.T @ (p - target)
        eye = torch.eye(len(self.gram)).double()
        mean = torch.linalg.solve(c * self.gram + eye / rule.prior_variance, self.shift)
        value = LOSSES[self.kind](z, y)[None]
        scale = self.mean(1, 0, value).clamp(min=0.01)
        self.lag(value, torch.ones_like(value))
        return (p - target) @ w[:D].T / scale / len(h), mean

    def mean(self, which, row, first):
        sums = self.sums[which]
        return torch.where(sums[2] > 0, sums[row] / sums[2], first)

    def lag(self, value, level):
        self.steps += 1
        lags = self.rule.lag or RECENT, self.rule.lag or max(LONG, self.steps / 2)
        share = 1 / torch.tensor(lags, dtype=torch.float64)[:, None, None]
        new = torch.stack([value, level, torch.ones_like(value)])
        self.sums = (1 - share) * self.sums + share * new

    def regression(self, h, y, z, w):
        rule, n, k = self.rule, len(h), y.shape[1]
        first = (z - y).square().mean(0)
        noise, tau2 = self.mean(0, 0, first), self.mean(1, 0, first)
        levels = self.mean(0, 1, y.square().mean(0))
        gradient, squares = torch.zeros(n, D).double(), torch.zeros(k).double()
        means = []
        for j in range(k):
            prior = rule.prior_variance * levels[j]  # in units of the labels
            a = self.gram + noise[j] / prior * torch.eye(len(self.gram)).double()
            means.append(torch.linalg.solve(a, self.shift[:, j]))
            for i in range(n):  # the posterior without the datum, by a factorization of its own
                rest = a - torch.outer(h[i], h[i])
                inverse = torch.linalg.inv(rest)
                m = inverse @ (self.shift[:, j] - h[i] * y[i, j])
                e = h[i] @ m - y[i, j]
                spread = tau2[j] * h[i] @ inverse @ h[i]
                nu = rule.degrees_of_freedom
                rho = (nu + 1) / 2 / (nu * tau2[j] + e**2 + spread)
                expected = 2 * (e * m + tau2[j] * inverse @ h[i])
                gradient[i] += rho * expected[:D] / (n * k)
                squares[j] += e**2 / n
        self.lag(squares, y.square().mean(0))
        return gradient, torch.stack(means, 1)


@pytest.mark.parametrize("labels_are", ["all there", "missing", "missing and given"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kinds", "classes"),
    [(["reg"], 3), (["bin"], 3), (["cls"], 3), (["cls"], 20), (["reg", "bin", "cls"], 3)],
)
@pytest.mark.parametrize("lag", [5, None])
def test_equals_the_formulas_datum_by_datum(kinds, classes, bias, labels_are, lag, monkeypatch):
    """A missing label is a datum that is not there, for that task; the others keep it."""
    monkeypatch.setattr(settings, "_RECENT", RECENT)
    monkeypatch.setattr(settings, "_LONG", LONG)
    modules, heads = network(kinds, bias, classes=classes)
    rule = replace(RULE, lag=lag)
    engine = BayesAgg(None, heads, rule=rule)
    references = {k: Reference(k, modules[k], rule) for k in kinds}
    for step in range(6 if lag else 9):  # half of the steps are more than three from the seventh on
        x, labels = batch(step, kinds, N + step, classes)
        expected, means, losses, targets = torch.zeros_like(x), {}, {}, {}
        for place, k in enumerate(kinds):
            known = (torch.arange(len(x)) + place) % 4 != 1
            if labels_are == "all there":
                known = torch.ones_like(known)
            gradient, means[k] = references[k].step(x[known], labels[k][known])
            expected[known] += gradient
            losses[k] = LOSSES[k](modules[k](x)[known], labels[k][known])
            targets.update(without({k: labels[k]}, k, ~known))
        loss = engine(losses, targets if labels_are == "missing and given" else None)
        torch.testing.assert_close(loss, sum(losses.values()))
        loss.backward()
        torch.testing.assert_close(x.grad, expected)
        for k in kinds:
            torch.testing.assert_close(references[k].weights(), means[k])
            assert all(p.grad is None for p in modules[k].parameters())


@pytest.mark.parametrize("kinds", [["reg"], ["reg", "bin", "cls"]])
def test_a_tower_of_identity_layers_equals_none(kinds):
    """And with it: heads that read tensors of their own equal heads that share one."""
    results = []
    for tower in (False, True):
        modules, heads = network(kinds)
        if tower:
            wrapped = {k: nn.Sequential(nn.Identity(), _Copy(), modules[k]) for k in kinds}
            heads = {k: KINDS[k][0](wrapped[k]) for k in kinds}
        else:
            wrapped = modules
        engine = BayesAgg(None, heads, rule=replace(RULE, keep_length=True))
        gradients = []
        for step in range(5):
            x, labels = batch(step, kinds)
            engine({k: LOSSES[k](wrapped[k](x), labels[k]) for k in kinds}).backward()
            gradients.append(x.grad)
        results.append([*gradients, *(p.detach() for p in modules.parameters())])
    if kinds == ["reg"]:
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
        return
    # The length of the aggregate is that of gradients at the features: of one tensor, or of three.
    torch.testing.assert_close(results[0][-6:], results[1][-6:], rtol=1e-9, atol=1e-12)


class _Copy(nn.Module):
    def forward(self, x):
        return x.clone()


def test_a_perfect_fit_has_a_bounded_weight():
    """Of a hundred: a loss of less than 0.01 nats counts as one of 0.01."""
    modules, heads = network(["bin"])
    with torch.no_grad():
        modules["bin"].weight.mul_(1e-3)
        modules["bin"].bias.fill_(30.0)
    engine = BayesAgg(None, heads, rule=RULE)
    x, _ = batch(0, ["bin"])
    loss = F.binary_cross_entropy_with_logits(modules["bin"](x), torch.ones(N, 1).double())
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    engine({"bin": loss}).backward()
    torch.testing.assert_close(x.grad, 100 * plain)


def test_many_classes_have_a_wider_prior():
    """As each has so many times fewer data; not where somebody has set it."""
    heads = [MulticlassHead(nn.Linear(D, classes)) for classes in (16, 32)]
    found = [
        LikelihoodRule().variance_of(head) for head in (*heads, RegressionHead(nn.Linear(D, 32)))
    ]
    assert found == pytest.approx([0.05, 0.1, 0.05])
    assert [RULE.variance_of(head) for head in heads] == [RULE.prior_variance] * 2


def test_features_that_are_there_twice_change_nothing():
    """The prior of an output is no larger on wider features, beyond 64 of them."""
    found = []
    for copies in (20, 40):
        modules, heads = network(KINDS, bias=False)
        for k, module in modules.items():
            wide = nn.Linear(copies * D, module.out_features, bias=False).double()
            with torch.no_grad():
                wide.weight.copy_(module.weight.repeat(1, copies) / copies)
            modules[k], heads[k] = wide, KINDS[k][0](wide)
        engine = BayesAgg(None, heads, rule=replace(RULE, prior_variance=None))
        for step in range(4):
            x, labels = batch(step, KINDS)
            h = x.repeat(1, copies)
            engine({k: LOSSES[k](modules[k](h), labels[k]) for k in heads}).backward()
        with torch.no_grad():
            found.append([x.grad, *(module(h) for module in modules.values())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("unit", [1e-3, 1e6])
def test_the_unit_of_a_label_does_not_matter(unit):
    """Gradients at the features are the same, weights of the head in its unit."""
    found = []
    for scale in (1.0, unit):
        modules, heads = network(["reg", "bin"])
        with torch.no_grad():  # the same problem in other units, the head included
            modules["reg"].weight.mul_(scale)
            modules["reg"].bias.mul_(scale)
        engine = BayesAgg(None, heads, rule=replace(RULE, warmup=1))
        for step in range(6):
            x, labels = batch(step, heads)
            labels["reg"] = scale * labels["reg"]
            engine({k: LOSSES[k](modules[k](x), labels[k]) for k in heads}).backward()
        found.append((x.grad, modules["reg"].weight.detach() / scale, modules["bin"].weight))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_a_thousand_classes_share_one_matrix():
    module = nn.Linear(64, 1000)
    engine = BayesAgg(None, {"kind": MulticlassHead(module)}, rule=replace(RULE, warmup=0))
    h = torch.randn(8, 64, requires_grad=True)
    engine({"kind": F.cross_entropy(module(h), torch.arange(8))}).backward()
    [unit] = engine.get_extra_state()["memory"]["units"]
    assert unit["gram"].shape == (1, 65, 65)
    assert h.grad.isfinite().all()


def test_settings_that_the_rule_does_not_use_warn_by_name():
    modules, _ = network(["bin"])
    with pytest.warns(UserWarning, match="'bin': s and num_samples have no effect"):
        BayesAgg(None, {"bin": BinaryHead(modules["bin"], s=0.5, num_samples=8)})
    with pytest.warns(UserWarning, match="steps_per_epoch has no effect"):
        BayesAgg(None, {"bin": BinaryHead(modules["bin"])}, steps_per_epoch=3)


@pytest.mark.parametrize(
    "given", [{"memory": 0}, {"warmup": -1}, {"lag": 0}, {"lag": 1.5}, {"prior_variance": 0.0}]
)
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        LikelihoodRule(**given)

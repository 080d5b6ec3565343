"""Wrong answers that once went unnoticed: each of these failed before the core was rebuilt."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import (
    BayesAgg,
    BayesAggWrapper,
    BinaryHead,
    LikelihoodRule,
    MulticlassHead,
    PaperRule,
    RegressionHead,
)
from tests.reading.losses import SMOOTH

RULES = {
    "likelihood": lambda: LikelihoodRule(warmup=0, keep_length=False),
    "paper": lambda: PaperRule(pretrain_epochs=0),
}
EPOCH = {"likelihood": None, "paper": 1000}
both = pytest.mark.parametrize("rule", RULES)


def engine_of(heads, rule):
    return BayesAgg(None, heads, rule=RULES[rule](), steps_per_epoch=EPOCH[rule])


def leaf(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).requires_grad_()


def linear(d, o, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(d, o).double()


@pytest.mark.parametrize("weight", [1e-2, 1e-4, 0.0])
def test_weights_reach_the_evidence(weight):
    """30 % corrupted labels of next to no weight: the head is the weighted fit. Default rule only:
    it writes the head after every step.
    """
    x, head = leaf(200, 3), linear(3, 1)
    y = x.detach()[:, :1].clone()
    w = torch.ones(200, 1, dtype=torch.float64)
    y[:60] += 10
    w[:60] = weight
    rule = LikelihoodRule(warmup=0, prior_variance=1e9, memory=10**9)
    engine = BayesAgg(None, {"y": RegressionHead(head)}, rule=rule)
    engine({"y": (w * (head(x) - y) ** 2).mean()}, {"y": y}).backward()
    a = torch.cat([x.detach(), torch.ones(200, 1).double()], 1)
    expected = torch.linalg.lstsq(w.sqrt() * a, w.sqrt() * y).solution
    found = torch.cat([head.weight.detach().T, head.bias.detach()[None]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Each with the number of classes, of which a regression has none.
OTHERS = {
    "huber": (0, lambda z, y: F.huber_loss(z, y, delta=0.1)),
    "l1": (0, F.l1_loss),
    "quantile": (0, lambda z, y: torch.maximum(0.9 * (y - z), 0.1 * (z - y)).mean()),
    "log_cosh": (0, lambda z, y: (z - y).cosh().log().mean()),
    "logit adjusted": (3, lambda z, y: F.cross_entropy(z + torch.tensor([2.0, 0.0, -2.0]), y)),
    "one against the rest": (
        3,
        lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()),
    ),
    "squared error": (3, lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double())),
    "focal": (3, SMOOTH["cls"]["focal"]),
}


@both
@pytest.mark.parametrize("name", OTHERS)
def test_a_loss_that_is_not_the_likelihood_keeps_its_gradient_and_its_head(rule, name):
    """Its gradient at the features is its own, times one factor; its head trains by it."""
    classes, loss = OTHERS[name]
    x, head = leaf(40, 3), linear(3, classes or 1)
    y = 3 * leaf(40, classes or 1, seed=1).detach()
    y = y.argmax(1) if classes else y
    engine = engine_of({"y": (MulticlassHead if classes else RegressionHead)(head)}, rule)
    expected = torch.autograd.grad(loss(head(x), y), [x, *head.parameters()])
    with pytest.warns(UserWarning, match="not the likelihood"):
        engine({"y": loss(head(x), y)}, {"y": y}).backward()
    cosine = F.cosine_similarity(x.grad.flatten(), expected[0].flatten(), dim=0)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-9, atol=0)
    for parameter, gradient in zip(head.parameters(), expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@both
@pytest.mark.parametrize("strength", [0.0, 100.0])
def test_a_penalty_on_the_features_arrives(rule, strength):
    """Inside of a loss with targets; what the head itself sends does not change."""
    gradients = []
    for penalty in (0.0, strength):
        x, head = leaf(16, 3), linear(3, 1)
        y = (leaf(16, 1, seed=1).detach() > 0).double()
        engine = engine_of({"y": BinaryHead(head)}, rule)
        loss = F.binary_cross_entropy_with_logits(head(x), y) + penalty * x.square().mean()
        engine({"y": loss}, {"y": y}).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], strength * 2 * x.detach() / x.numel())


@both
def test_another_path_to_the_features_keeps_its_gradient(rule):
    """An offset that the loss adds to the head's output: its own path carries its own gradient."""
    offset, y, gradients = linear(3, 1, seed=5), leaf(16, 1, seed=1).detach(), []
    for frozen in (True, False):
        x, head = leaf(16, 3), linear(3, 1)
        g = offset(x).detach() if frozen else offset(x)
        residual = (head(x) + g - y).detach()
        engine_of({"y": RegressionHead(head)}, rule)({"y": F.mse_loss(head(x) + g, y)}).backward()
        gradients.append(x.grad)
    expected = 2 * residual / 16 @ offset.weight
    torch.testing.assert_close(gradients[1] - gradients[0], expected.detach())


def test_task_weights_are_over_the_labels_that_there_are():
    """Whether 90 % of a task's labels are missing does not change its share. Default rule only:
    shares of the paper's are recorded in tests/rules.
    """
    shares = []
    for missing in (False, True):
        x, a, b = leaf(100, 3), linear(3, 1), linear(3, 1, seed=1)
        y = leaf(100, 2, seed=2).detach()
        t = y.clone()
        if missing:
            t[10:, 1] = torch.nan
        engine = engine_of({"a": BinaryHead(a), "b": BinaryHead(b)}, "likelihood")
        p = (y > 0).double()
        known = ~t[:, 1:].isnan()
        per_datum = F.binary_cross_entropy_with_logits(b(x), p[:, 1:], reduction="none")
        losses = {
            "a": F.binary_cross_entropy_with_logits(a(x), p[:, :1]),
            "b": (per_datum * known).sum() / known.sum(),
        }
        targets = {"b": torch.where(known, p[:, 1:], torch.nan)}
        engine(losses, targets).backward()
        shares.append(engine.task_weights["b"].item())
    assert abs(shares[0] - shares[1]) < 0.1


def test_the_length_of_the_aggregate_stays_near_that_of_the_plain_gradient():
    """Also where a task is learned without any noise; under SGD, whose steps it sets."""
    torch.manual_seed(0)
    body, head = nn.Sequential(nn.Linear(3, 8), nn.Tanh()), nn.Linear(8, 1)
    truth = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.05)
    rule = LikelihoodRule(warmup=10, lag=20)
    optimizer = BayesAggWrapper(sgd, body, {"y": RegressionHead(head)}, rule=rule)
    lengths = []
    for _ in range(300):
        x = torch.randn(32, 3)
        h = body(x)
        h.retain_grad()
        loss = F.mse_loss(head(h), truth(x).detach())
        plain = torch.autograd.grad(loss, h, retain_graph=True)[0].norm()
        optimizer.zero_grad()
        optimizer.step({"y": loss})
        lengths.append((h.grad.norm(), plain))
    ours, plain = torch.tensor(lengths[100:]).square().mean(0).sqrt()
    assert 1 / 3 < ours / plain < 3

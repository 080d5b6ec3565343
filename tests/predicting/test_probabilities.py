"""Integrals of sigmoid and softmax, at every width of the logits."""

import pytest
import torch
from torch import nn

from bayesagg import BinaryHead
from bayesagg.predicting import Predictor
from bayesagg.predicting.probabilities import class_probabilities, sigmoid_moments


@pytest.mark.parametrize("logit", [20.0, 95.0, 300.0, 1e5])
def test_logits_of_probabilities_that_underflow_are_numbers(logit):
    net = nn.Linear(1, 1, bias=False)
    x = torch.tensor([[1.0], [-1.0]])
    predictor = Predictor.fit(net, {"bin": BinaryHead(net)}, [(x, {"bin": (x > 0).float()})])
    predictor.posteriors[0].mean.fill_(logit)
    predictor.posteriors[0].variances.fill_(1e-12)
    p = predictor(x)["bin"]
    found = p.distribution.logits
    assert not found.isnan().any() and (found * x >= min(logit, 80) * 0.99).all()
    torch.testing.assert_close(p.mean, (x > 0).float(), rtol=0, atol=1e-8)
    for part in (p.stddev, p.epistemic, p.aleatoric, *p.interval()):
        assert part.isfinite().all()


def test_sigmoid_moments_at_every_width():
    mean = torch.tensor([-20.0, -3.0, 0.0, 0.5, 8.0]).double()[:, None]
    sd = torch.tensor([1e-3, 0.3, 1.5, 5.0, 30.0]).double()
    mean, sd = (value.flatten() for value in torch.broadcast_tensors(mean, sd))
    x = torch.linspace(-9, 9, 200_001).double()
    w = torch.exp(-x.square() / 2)
    w = w / w.sum()
    p = (mean[:, None] + sd[:, None] * x).sigmoid()
    expected = (p * w).sum(1)
    first, other, variance = sigmoid_moments(mean, sd)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(first + other, torch.ones_like(first))
    spread = ((p - expected[:, None]).square() * w).sum(1)
    torch.testing.assert_close(variance, spread, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 5, 150])
def test_class_probabilities_of_narrow_logits_are_the_softmax(classes):
    mean = torch.randn(4, classes).double()
    logs, weights = class_probabilities(mean, torch.zeros(4, classes, classes - 1).double())
    torch.testing.assert_close((logs.exp() * weights).sum(2), mean.softmax(1))

"""The paper's rule with many classes: a bound on the curvature, and samples."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, MulticlassHead, RegressionHead
from bayesagg.errors import NumericalWarning
from bayesagg.likelihoods import Given
from bayesagg.likelihoods.multiclass import BoundedMulticlass
from bayesagg.posterior import augment
from bayesagg.reading import Labels
from bayesagg.rules import PaperRule

D = 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(outputs):
    layer = nn.Linear(D, outputs).double()
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=100 + i))
    return layer


def labels_of(head, h):
    """A head's outputs and classes, for a mean loss."""
    z = head.linear(h).detach()
    y = F.one_hot(randn(*z.shape).argmax(1), z.shape[1]).double()
    return Labels(z[:, None], y[:, None], torch.full((1, 1), 1 / len(h)).double(), None)


def start(rule, heads):
    return rule.start(heads, torch.float64, 0, None)


def test_many_classes_say_that_their_curvature_is_bounded():
    with pytest.warns(NumericalWarning, match="task 'c': the curvature .* 30 classes of 4 weights"):
        memory = start(
            PaperRule(), {"c": MulticlassHead(linear(30)), "d": MulticlassHead(linear(3))}
        )
    assert [type(group.likelihood).__name__ for group in memory.groups] == [
        "BoundedMulticlass",
        "Multiclass",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(PaperRule(), {"c": MulticlassHead(linear(16))})


@pytest.mark.parametrize("bias", [True, False])
def test_a_network_of_many_classes_trains(bias):
    torch.manual_seed(0)
    trunk, layer = nn.Linear(4, D), nn.Linear(D, 25, bias)
    head = MulticlassHead(layer, readout="posterior", s=0.5)
    with pytest.warns(NumericalWarning):
        heads = {"c": head, "r": RegressionHead(nn.Linear(D, 1))}
        engine = BayesAgg(trunk, heads, rule=PaperRule(pretrain_epochs=0), steps_per_epoch=2)
    before = layer.weight.detach().clone()
    for _ in range(2):
        h = trunk(torch.randn(40, 4))
        y = torch.randint(25, (40,))
        engine.backward(
            {"c": F.cross_entropy(layer(h), y), "r": heads["r"].linear(h).square().mean()}
        )
        engine.stepped()
    assert torch.isfinite(trunk.weight.grad).all()
    assert not torch.allclose(layer.weight, before)


def test_bounded_moments_are_those_of_samples():
    head = MulticlassHead(linear(5))
    likelihood = BoundedMulticlass(D, True, 5)
    heads = {"c": head}
    group = replace(start(PaperRule(), heads).groups[0], likelihood=likelihood)
    h = randn(6, D)
    labels, features = labels_of(head, h), augment(h, True)
    posterior = group.posterior(likelihood.evidence(features, labels, None), None)
    generator = torch.Generator().manual_seed(0)
    given = Given(features, labels.targets, posterior, generator)
    mean, covariance = likelihood.covariances(given)
    logs = likelihood.moments(given, torch.float64)
    torch.testing.assert_close(logs.mean, mean)
    variance = logs.relative * logs.log_scale.exp()
    torch.testing.assert_close(variance, covariance.diagonal(dim1=-2, dim2=-1))
    many = replace(likelihood, samples=4096)
    exact = many.covariances(given)
    w = posterior.sample(200_000, generator)  # [J, C, D]
    error = torch.softmax(torch.einsum("jcd,nd->njc", w, features), 2) - labels.targets
    g = torch.einsum("njc,jcd->njd", error, w[..., :D])
    for found in ((mean, covariance), exact):
        torch.testing.assert_close(found[0][:, 0], g.mean(1), rtol=0.02, atol=0.02)
        sampled = torch.stack([x.mT.cov() for x in g])
        torch.testing.assert_close(found[1][:, 0], sampled, rtol=0.1, atol=0.02)


def test_the_bound_is_above_the_curvature_and_touches_the_likelihood():
    head = MulticlassHead(linear(4))
    h = randn(50, D)
    labels, features = labels_of(head, h), augment(h, True)
    bound = BoundedMulticlass(D, True, 4).evidence(features, labels, None)
    p = labels.outputs[:, 0].softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    exact = torch.einsum("nab,ni,nj->aibj", curvature, features, features).reshape(16, 16)
    whole = torch.block_diag(*[bound.precision[0]] * 4)
    assert torch.linalg.eigvalsh(whole - exact).min() > -1e-9
    weights = torch.cat([head.linear.weight, head.linear.bias[:, None]], 1).detach()
    gradient = weights @ bound.precision[0] - bound.shift
    torch.testing.assert_close(gradient, (p - labels.targets[:, 0]).mT @ features)
    half = replace(labels, factor=torch.tensor([[2.0]] * 25 + [[0.0]] * 25).double())
    weighted = BoundedMulticlass(D, True, 4).evidence(features, labels, half.factor)
    first = BoundedMulticlass(D, True, 4).evidence(
        features[:25], Labels(labels.outputs[:25], labels.targets[:25], labels.factor, None), None
    )
    torch.testing.assert_close(weighted.precision, 2 * first.precision)
    torch.testing.assert_close(weighted.shift, 2 * first.shift)

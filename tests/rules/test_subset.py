"""Inference from a subset of the data, ``max_data``.

A setting of the paper's rule: its moments take a tensor of data, tasks and dimensions, and its
default (``None``) all data.
"""

import pytest
import torch
from torch.nn import functional as F

import bayesagg.rules.paper
from bayesagg import RegressionHead
from bayesagg.likelihoods import Given
from bayesagg.reading import Labels
from bayesagg.rules.subset import draw
from tests.helpers.data import LOSSES, ignore, losses_over, make_batch, without
from tests.helpers.nets import plain_net
from tests.helpers.states import assert_finite, assert_near, assert_same, difference, snapshot
from tests.helpers.training import make_engine, wrap
from tests.loops.test_dense import LAYOUTS, Layout

N = 24
OUTPUTS = {"reg": 1, "bin": 1, "cls": 3}
S = {name: {"s": 0.5} for name in OUTPUTS}


def batch(seed, device, dtype, *, missing=False, size=N):
    x, labels = make_batch(device, dtype, seed=seed, size=size, outputs=OUTPUTS)
    return x, ignore(labels, seed)[0] if missing else labels


def dense_engine(net, settings=S, **kwargs):
    return make_engine(net, "paper", settings=settings, steps_per_epoch=None, **kwargs)


def run(device, dtype, *, missing=False, **kwargs):
    net = plain_net(device, dtype, outputs=OUTPUTS)
    optimizer = wrap(net, "adam", "paper", settings=S, **kwargs)
    for index in range(6):
        x, labels = batch(index, device, dtype, missing=missing)
        optimizer.zero_grad()
        optimizer.step(losses_over(net(x), labels))
    return net, optimizer


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("max_data", [N, 10 * N])
def test_a_subset_of_all_is_all(max_data, missing, device, dtype):
    """Where it is no smaller than the batch, ``max_data`` changes no bit."""
    results = [snapshot(*run(device, dtype, missing=missing, max_data=m)) for m in (None, max_data)]
    assert_same(*results)


def test_a_subset_depends_on_the_seed_alone(device, dtype):
    """The global generator has no say; another seed gives other subsets."""
    results = []
    for outer, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(outer)
        results.append(snapshot(*run(device, dtype, max_data=7, seed=seed))["parameters"])
    assert_same(results[0], results[1])
    assert difference(results[0], results[2]) is not None


def labels_with(present):
    """Labels of which only the mask matters."""
    filler = torch.zeros(len(present), 1)
    return [Labels(filler, filler, torch.ones(1, 1), present[:, None])]


@pytest.mark.parametrize("max_data", [1, 4, 7, 10])
def test_every_labelled_datum_is_drawn_as_often(max_data):
    """So that sums over the subset, scaled, are unbiased; never a datum without a label."""
    present = torch.arange(16) % 3 != 1  # 11 of 16
    counts, repeats = torch.zeros(16, dtype=torch.float64), 6000
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        index, scale = draw(labels_with(present), 16, max_data, generator)
        assert len(index) == max_data and scale == 11 / max_data
        counts += torch.bincount(index, minlength=16)
    expected = present.double() / scale
    assert torch.equal(counts == 0, ~present)
    # Five standard errors of a proportion.
    assert ((counts / repeats - expected).abs() < 5 * (0.25 / repeats) ** 0.5).all()


def test_few_labelled_data_are_all_used():
    present = torch.arange(16) < 5
    assert draw(labels_with(present), 16, 5, torch.Generator()) is None
    assert draw(labels_with(present), 16, 4, torch.Generator()) is not None


@pytest.mark.parametrize("noise", [1.0, "learned"])
def test_equal_data_make_a_subset_exact(noise, device, dtype):
    """Copies of one datum: its scaled evidence is that of the batch, and so are the weights."""
    results = []
    for max_data in (None, 4):
        net = plain_net(device, dtype, outputs=OUTPUTS)
        settings = {**S, "reg": {"s": 0.5, "noise_variance": noise}}
        engine = dense_engine(net, settings, max_data=max_data)
        for index in range(6):
            x, labels = batch(index, device, dtype, size=1)
            x, labels = x.expand(20, -1), {n: y.expand(20, *y.shape[1:]) for n, y in labels.items()}
            engine.backward(losses_over(net(x), labels))
            if index % 2:
                engine.end_epoch()
        state = engine.get_extra_state()
        results.append([state["memory"]["groups"], state["task_weights"]])
    assert results[0][0][0]["full"]["count"].tolist() == [40]
    assert_near(*results, tolerance=1e-7 if dtype == torch.float64 else 1e-3)


class Spy:
    """Stands before ``combine`` and ``extend``, and keeps what they were given."""

    def __init__(self, monkeypatch):
        self.calls = {}
        for name in ("combine", "extend"):
            self.calls[name] = getattr(bayesagg.rules.paper, name)
            monkeypatch.setattr(bayesagg.rules.paper, name, getattr(self, name))

    def combine(self, sample, posteriors, **kwargs):
        self.groups, self.labels, self.posteriors = sample.groups, sample.labels, posteriors
        self.features = sample.features[True]
        self.alone, weights = self.calls["combine"](sample, posteriors, **kwargs)
        return self.alone.clone(), weights

    def extend(self, sample, *args):
        self.index, self.means = sample.index, {}
        for group, posterior in zip(self.groups, self.posteriors, strict=True):
            self.means.update(group.means(posterior))
        return self.calls["extend"](sample, *args)


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("missing", [False, True])
def test_gradient_inside_and_outside_the_subset(missing, scale, device, dtype, monkeypatch):
    """Inside: Eq. 7 of those data alone. Outside: the mean weights on the gradients of autograd
    at the posterior mean, datum by datum."""
    spy = Spy(monkeypatch)
    net = plain_net(device, dtype, outputs=OUTPUTS)
    engine = dense_engine(net, max_data=9, pretrain_epochs=0, gradient_scale=scale)
    x, labels = batch(3, device, dtype, missing=missing)
    h = net.trunk(x)
    h.retain_grad()
    engine.backward(losses_over({n: head(h) for n, head in net.heads.items()}, labels))
    inside = torch.zeros(N, dtype=torch.bool, device=device)
    inside[spy.index] = True
    assert 0 < inside.sum() <= 9
    torch.testing.assert_close(h.grad[spy.index], spy.alone.to(dtype))
    expected = outside(spy, h, labels, scale)
    torch.testing.assert_close(h.grad[~inside], expected[~inside])
    assert (h.grad[~inside].abs().sum(1) > 0).sum() > 5


def outside(spy, h, labels, scale):
    """The gradient at every datum by the formula of :mod:`bayesagg.rules.subset`, naively."""
    present = {n: y != -100 if n == "cls" else ~y.isnan()[:, 0] for n, y in labels.items()}
    alpha = conditional_weights(spy, present)
    leaf = h.detach().double().requires_grad_()
    result = torch.zeros_like(leaf)
    for i in range(len(leaf)):
        own = [n for n in OUTPUTS if bool(present[n][i])]
        norm = sum(alpha[n] for n in own)
        for n in own:
            mean = spy.means[n].double()
            z = leaf[i : i + 1] @ mean[:, :-1].mT + mean[:, -1]
            y = labels[n][i : i + 1]
            loss = LOSSES[n](z, y if n == "cls" else y.double()) / int(present[n].sum())
            [gradient] = torch.autograd.grad(loss, leaf)
            result[i] += alpha[n] / norm * gradient[i] * (len(own) if scale == "sum" else 1)
    return result.to(h.dtype)


def conditional_weights(spy, present):
    """α by task and dimension, the mean over the data of the subset that have a label of it."""
    log_variance, factors = {}, {}
    generator = torch.Generator(spy.features.device)
    for group, known, posterior in zip(spy.groups, spy.labels, spy.posteriors, strict=True):
        given = Given(spy.features, known.targets, posterior, generator)
        _, relative, log_scale = group.likelihood.moments(given, spy.features.dtype)
        second = relative.log() + log_scale
        for k, n in enumerate(group.heads):
            log_variance[n] = second[:, k]
            factors[n] = float(known.factor[0, k])
    alpha = {n: [] for n in log_variance}
    for row, datum in enumerate(spy.index.tolist()):
        own = [n for n in alpha if bool(present[n][datum])]
        score = [-0.5 * (log_variance[n][row] + 2 * torch.tensor(factors[n]).log()) for n in own]
        for n, value in zip(own, torch.softmax(torch.stack(score), 0), strict=True):
            alpha[n].append(value)
    return {n: torch.stack(values).mean(0) for n, values in alpha.items()}


def test_certain_posteriors_and_uniform_weights_are_linear_scalarization(device):
    """As S → 0, with s = 0, inside and outside alike."""
    net = plain_net(device, outputs={"reg": 1})
    x, _ = batch(0, device, torch.float64)
    with torch.no_grad():
        label = net(x)["reg"] + 0.1  # by another bias: the end of the epoch will find it
    head = RegressionHead(net.heads["reg"], s=0.0, prior_variance=1e12, noise_variance=1e-12)
    engine = make_engine(net, "paper", heads={"reg": head}, max_data=8, steps_per_epoch=None)
    for _ in range(50):  # so that the batch below hardly moves the posterior
        engine.backward({"reg": F.mse_loss(net(x)["reg"], label)})
    engine.end_epoch()
    torch.testing.assert_close(net(x)["reg"], label, rtol=0, atol=1e-5)
    target = label + torch.randn(N, 1, device=device, dtype=torch.float64) * 1e-3
    grads = []
    for backward in (lambda losses: losses["reg"].backward(), engine.backward):
        h = net.trunk(x)
        h.retain_grad()
        backward({"reg": F.mse_loss(net.heads["reg"](h), target)})
        grads.append(h.grad)
    torch.testing.assert_close(*grads, rtol=0.05, atol=1e-6)


def test_maps_take_a_subset_too(device, dtype):
    """The same step from rows and from maps, whose order of data is that of the rows."""
    results = []
    flat = plain_net(device, dtype)
    x, labels = make_batch(device, dtype, size=12)
    for net, view in ((flat, lambda t: t), (Layout(flat, "conv2d"), LAYOUTS["conv2d"])):
        engine = dense_engine(net, max_data=7, pretrain_epochs=0)
        out = net(view(x))
        losses = {n: LOSSES[n](out[n], view(labels[n])) for n in ("reg", "bin")}
        classes = labels["cls"] if net is flat else view(labels["cls"])[:, 0]
        engine.backward({**losses, "cls": F.cross_entropy(out["cls"], classes)})
        results.append([p.grad.view(-1) for p in net.trunk.parameters()])
    torch.testing.assert_close(*results)


def test_a_subset_without_a_task_leaves_it_a_say(device, dtype):
    """One labelled pixel of a task outside the subset: uniform weights, not zero, not NaN."""
    net = plain_net(device, dtype, outputs=OUTPUTS)
    engine = dense_engine(net, max_data=1, pretrain_epochs=0)
    x, labels = batch(0, device, dtype)
    for name in ("bin", "cls"):
        labels = without(labels, name, torch.arange(N, device=device) > 0)
    h = net.trunk(x)
    h.retain_grad()
    engine.backward(losses_over({n: head(h) for n, head in net.heads.items()}, labels))
    assert torch.isfinite(h.grad).all() and (h.grad.abs().sum(1) > 0).all()
    engine.end_epoch()
    assert_finite(snapshot(net, engine))

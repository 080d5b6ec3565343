"""Posteriors and predictions against naive formulas and against sampling."""

import functools

import pytest
import torch
from torch.nn import functional as F

from bayesagg import BayesAgg
from bayesagg.errors import NumericalWarning
from bayesagg.predicting import Predictor, predictor
from tests.helpers.data import make_batch
from tests.helpers.nets import plain_net
from tests.predicting.cases import all_of, features_of, heads_of, loader

GAMMA = 0.3
CENTRE = torch.eye(3).double() - 1 / 3  # takes the common mode of three classes away


def fitted(data, net=None, **kwargs):
    net = plain_net() if net is None else net
    kwargs.setdefault("prior_variance", GAMMA)
    return net, Predictor.fit(net, heads_of(net, **kwargs.pop("settings", {})), data, **kwargs)


# --- regression ----------------------------------------------------------------------------------


def test_a_given_noise_gives_the_textbook_posterior():
    data = loader()
    net, predictor = fitted(data, settings={"reg": {"noise_variance": 0.7}})
    x, y = all_of(data)
    h, new = features_of(net, x), make_batch(seed=1, size=9)[0]
    covariance = torch.linalg.inv(h.mT @ h / 0.7 + torch.eye(h.shape[1]).double() / GAMMA)
    mean = covariance @ h.mT @ y["reg"] / 0.7
    p, g = predictor(new)["reg"], features_of(net, new)
    epistemic = ((g @ covariance) * g).sum(1)[:, None].expand(-1, 2)
    torch.testing.assert_close(p.mean, g @ mean)
    torch.testing.assert_close(p.epistemic, epistemic)
    torch.testing.assert_close(p.aleatoric, torch.full_like(epistemic, 0.7))
    torch.testing.assert_close(p.stddev, (epistemic + 0.7).sqrt())
    assert isinstance(p.distribution, torch.distributions.Normal)
    torch.testing.assert_close(p.covariance()[1], g @ covariance @ g.mT)


def evidence(h, y, gamma, tau2):
    """Marginal likelihood of one output, in logarithms."""
    covariance = gamma * h @ h.mT + tau2 * torch.eye(len(h)).double()
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(h)).double(), covariance)
    return float(normal.log_prob(y))


def test_learned_noise_is_where_the_marginal_likelihood_is_greatest():
    data = loader()
    net, predictor = fitted(data)
    x, y = all_of(data)
    h, posterior = features_of(net, x), predictor.posteriors[0]
    for tau2, dof, m, own in zip(
        posterior.noise.tolist(), posterior.dof, posterior.mean, y["reg"].mT, strict=True
    ):
        best = evidence(h, own, GAMMA, tau2)
        assert best > max(evidence(h, own, GAMMA, tau2 * factor) for factor in (1.01, 1 / 1.01))
        assert tau2 == pytest.approx(float((own - h @ m).square().sum() / dof))


def test_a_prior_by_marginal_likelihood_is_better_than_its_neighbours():
    data = loader()
    for x, y in data:  # a signal, or else no prior is too narrow
        y["reg"] += 2 * x[:, :2]
    net, predictor = fitted(
        data, settings={"reg": {"noise_variance": 1.0}}, prior_variance="marginal_likelihood"
    )
    x, y = all_of(data)
    h, posterior = features_of(net, x), predictor.posteriors[0]
    omega = torch.linalg.eigvalsh(h.mT @ h)
    for variances, own in zip(posterior.variances[0], y["reg"].mT, strict=True):
        gamma = float(1 / (1 / variances - omega).mean())
        best = evidence(h, own, gamma, 1.0)
        assert best > max(evidence(h, own, gamma * factor, 1.0) for factor in (1.1, 1 / 1.1))


def test_without_a_prior_the_unit_of_the_labels_does_not_matter():
    net, data = plain_net(), loader()
    heads, x = heads_of(net), data[0][0]
    plain = Predictor.fit(net, heads, data)(x)["reg"]
    prices = [(x, {**y, "reg": 1e5 * y["reg"]}) for x, y in data]
    found = Predictor.fit(net, heads, prices)(x)["reg"]
    torch.testing.assert_close(found.mean, 1e5 * plain.mean)
    torch.testing.assert_close(found.stddev, 1e5 * plain.stddev)
    with pytest.warns(NumericalWarning, match="'reg'.*prior variance of 1 expects") as caught:
        Predictor.fit(net, heads, prices, prior_variance=1.0)
    own = heads_of(net, reg={"prior_variance": 1.0})
    with pytest.warns(NumericalWarning, match="squared units of the labels") as other:
        Predictor.fit(net, own, prices)
    assert {one.filename for one in [*caught, *other]} == {__file__}


def test_the_paper_s_prior_has_the_unit_of_the_labels_and_the_warning_a_way_out():
    """That of the rule is one; who has set nothing cannot leave it out."""
    net = plain_net()
    engine = BayesAgg(None, heads_of(net), rule="paper")
    prices = [(x, {**y, "reg": 1e5 * y["reg"]}) for x, y in loader()]
    with pytest.warns(NumericalWarning, match="prior variance of 1 expects") as caught:
        engine.predictor(net, prices)
    assert "leave it out" not in str(caught[0].message)
    engine.predictor(net, prices, prior_variance="marginal_likelihood")
    engine.predictor(net, prices, prior_variance=1e10)


def test_missing_labels_are_left_out():
    data = loader()
    for _, y in data:
        for name in ("reg", "bin"):
            y[name][torch.rand(len(y[name]), 2) < 0.3] = torch.nan
        y["cls"][torch.rand(len(y["cls"])) < 0.3] = -100
    net, predictor = fitted(data)
    x, y = all_of(data)
    new = make_batch(seed=1)[0]
    for name, k in (("reg", [0]), ("reg", [1]), ("bin", [1]), ("cls", [0, 1, 2])):
        seen = y["cls"] != -100 if name == "cls" else ~y[name][:, k[0]].isnan()
        some = {
            n: v[seen].clamp(min=0) if n == "cls" else v[seen].nan_to_num() for n, v in y.items()
        }
        alone = fitted([(x[seen], some)], net=net)[1]
        a, b = predictor(new)[name], alone(new)[name]
        torch.testing.assert_close(a.mean[:, k], b.mean[:, k])
        torch.testing.assert_close(a.stddev[:, k], b.stddev[:, k])


def test_samples_have_the_formulas_covariance_jointly():
    data = loader()
    _, predictor = fitted(data)
    predictor.posteriors[0].dof.fill_(7.0)  # Student-t of heavy tails
    predictor.posteriors[0].scale.fill_(1.5)
    p = predictor(make_batch(seed=1, size=4)[0])["reg"]
    generator = torch.Generator().manual_seed(0)
    drawn = p.sample(200_000, generator=generator)
    for k in range(2):
        found, expected = torch.cov(drawn[..., k].mT), p.covariance()[k]
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.max()))
    labels = p.sample(200_000, noise=True, generator=generator)
    torch.testing.assert_close(labels.std(0), p.stddev, rtol=0.02, atol=0)
    torch.testing.assert_close(p.distribution.stddev, p.stddev)


def test_intervals_hold_what_they_say():
    _, predictor = fitted(loader())
    predictor.posteriors[0].dof.fill_(4.0)
    p = predictor(make_batch(seed=1)[0])["reg"]
    labels = p.distribution.sample((100_000,))
    for level in (0.5, 0.9):
        low, high = p.interval(level)
        inside = ((labels > low) & (labels < high)).double().mean(0)
        assert (inside - level).abs().max() < 0.01
    with pytest.raises(ValueError, match="between 0 and 1"):
        p.interval(1.0)


# --- classification ------------------------------------------------------------------------------


def naive_mode(loss, start):
    w = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return w.detach()


@pytest.mark.parametrize("far", [1.0, 50.0])
def test_binary_outputs_are_laplace_at_the_mode(far):
    data, net = loader(), plain_net()
    with torch.no_grad():
        net.heads["bin"].weight.mul_(far)
    net, predictor = fitted(data, net=net)
    x, y = all_of(data)
    h, new = features_of(net, x), make_batch(seed=1, size=9)[0]
    g = features_of(net, new)
    p = predictor(new)["bin"]
    for k in range(2):

        def loss(w, y=y["bin"][:, k]):
            fit = F.binary_cross_entropy_with_logits(h @ w, y, reduction="sum")
            return fit + w.square().sum() / (2 * GAMMA)

        w = naive_mode(loss, torch.zeros(h.shape[1]).double())
        covariance = torch.linalg.inv(torch.autograd.functional.hessian(loss, w))
        torch.testing.assert_close(p.output[:, k], g @ w, rtol=1e-5, atol=1e-6)
        variance = ((g @ covariance) * g).sum(1)
        torch.testing.assert_close(p.output_variance[:, k], variance, rtol=1e-5, atol=1e-8)
        z = g @ w + variance.sqrt() * torch.randn(200_000, 1).double()
        torch.testing.assert_close(p.mean[:, k], z.sigmoid().mean(0), rtol=0, atol=3e-3)
        found, expected = p.epistemic[:, k], z.sigmoid().var(0)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-5)


def test_classes_are_laplace_at_the_mode():
    data = loader()
    net, predictor = fitted(data)
    x, y = all_of(data)
    h, new = features_of(net, x), make_batch(seed=1, size=9)[0]
    g, shape = features_of(net, new), (3, h.shape[1])

    def loss(w):
        fit = F.cross_entropy(h @ w.view(shape).mT, y["cls"], reduction="sum")
        return fit + w.square().sum() / (2 * GAMMA)

    w = naive_mode(loss, torch.zeros(shape[0] * shape[1]).double())
    covariance = torch.linalg.inv(torch.autograd.functional.hessian(loss, w))
    p = predictor(new)["cls"]
    torch.testing.assert_close(p.output, g @ w.view(shape).mT, rtol=1e-5, atol=1e-6)
    logits = torch.einsum("nd,cdef,nf->nce", g, covariance.view(*shape, *shape), g)
    variance = (CENTRE @ logits @ CENTRE).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(p.output_variance, variance, rtol=1e-5, atol=1e-8)
    draws = torch.distributions.MultivariateNormal(w, covariance).sample((100_000,))
    probabilities = (g @ draws.view(-1, *shape).mT).softmax(-1)
    torch.testing.assert_close(p.mean, probabilities.mean(0), rtol=0, atol=2e-3)
    torch.testing.assert_close(p.epistemic, probabilities.var(0), rtol=0.03, atol=1e-5)
    own = p.sample(100_000, generator=torch.Generator().manual_seed(0))
    centred, expected = own - own.mean(0), probabilities - probabilities.mean(0)
    torch.testing.assert_close(
        torch.einsum("sic,sjc->ij", centred, centred),
        torch.einsum("sic,sjc->ij", expected, expected),
        rtol=0.05,
        atol=0.02 * float(expected[:, 0].square().sum()),
    )
    total = p.epistemic + p.aleatoric
    torch.testing.assert_close(total, p.mean * (1 - p.mean))
    torch.testing.assert_close(p.stddev.square(), total)
    low, high = p.interval(0.8)
    inside = ((probabilities > low) & (probabilities < high)).double().mean(0)
    assert (inside - 0.8).abs().max() < 0.02


def test_a_kronecker_product_beyond_the_size_is_the_formula():
    data = loader()
    net, predictor = fitted(data, max_parameters=1, passes=200)
    h, new = features_of(net, all_of(data)[0]), make_batch(seed=1, size=9)[0]
    p, g = predictor(new)["cls"], features_of(net, new)
    exact = fitted(data, net=net)[1](new)["cls"]
    torch.testing.assert_close(p.output, exact.output, rtol=1e-3, atol=1e-4)  # the same mode
    q = (h @ predictor.posteriors[2].mean.mT).softmax(1)
    left = torch.diag_embed(q).mean(0) - q.mT @ q / len(q)
    precision = torch.kron(left, h.mT @ h) + torch.eye(3 * h.shape[1]).double() / GAMMA
    covariance = torch.linalg.inv(precision).view(3, h.shape[1], 3, h.shape[1])
    logits = torch.einsum("nd,cdef,nf->nce", g, covariance, g)
    expected = (CENTRE @ logits @ CENTRE).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(p.output_variance, expected, rtol=1e-6, atol=1e-9)
    p, posterior = predictor(new)["bin"], predictor.posteriors[1]
    close = fitted(data, net=net)[1](new)["bin"]
    torch.testing.assert_close(p.output, close.output, rtol=1e-2, atol=1e-3)
    for k in range(2):  # of binary outputs the mean curvature of each
        level = (h @ posterior.mean[k]).sigmoid()
        precision = (level * (1 - level)).mean() * h.mT @ h + torch.eye(h.shape[1]).double() / GAMMA
        expected = ((g @ torch.linalg.inv(precision)) * g).sum(1)
        torch.testing.assert_close(p.output_variance[:, k], expected, rtol=1e-6, atol=1e-9)


def test_features_that_do_not_fit_the_cache_give_the_same(monkeypatch):
    data, net = loader(), plain_net()
    whole = fitted(data, net=net)[1]
    monkeypatch.setattr(predictor, "Source", functools.partial(predictor.Source, cache=10))
    again = fitted(data, net=net)[1].state_dict()
    for key, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again[key]), key

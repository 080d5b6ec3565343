"""The Student-t gradient against its definition: refits without each datum, and autograd."""

import pytest
import torch

from bayesagg.moments import Spectrum, leave_one_out, regression_moments, student_gradient
from bayesagg.posterior import Gaussian, augment, from_natural

NU = 10.0


def problem(seed, n, d, k, device, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, k, generator=generator, dtype=torch.float64)
    ridge = torch.rand(1, k, generator=generator, dtype=torch.float64) + 0.1
    return augment(h, True).to(device), y.to(device), ridge.to(device)


def evidence(features, targets, weights=None):
    weighted = features if weights is None else features * weights
    return (weighted.mT @ features)[None], (targets.mT @ weighted)[None]


def fit(features, targets, ridge, weights=None):
    return Spectrum.of(*evidence(features, targets, weights), ridge)


def refit(features, targets, ridge, weights=None):
    """A Gaussian of one output by a dense factorization; its covariance in units of the noise."""
    gram, shift = evidence(features, targets[:, None], weights)
    return from_natural(gram + ridge * torch.eye(gram.shape[1]).to(gram), shift[0])


def gradient_of(features, y, posterior, noise, weights=None, factor=None):
    """One output a call: the function returns the sum over outputs."""
    n, k = y.shape
    found, ratios = [], []
    w = None if weights is None else weights[None]
    for j in range(k):
        one = Spectrum(
            posterior.vectors,
            posterior.inverse[:, j : j + 1],
            posterior.mean[:, j : j + 1],
            posterior.values,
        )
        left = leave_one_out(features[None], y[None, :, j : j + 1], one, w)
        ones = y.new_ones(1, n, 1) if factor is None else factor[None]
        d = features.shape[1] - 1
        g, rho = student_gradient(left, one, d, noise[None, j : j + 1], ones, NU, w)
        found.append(g[0])
        ratios.append(rho[0, :, 0])
    return torch.stack(found, 1), torch.stack(ratios, 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (5, 3), (30, 4), (4, 9)])
def test_leave_one_out_equals_a_refit_without_the_datum(device, n, d, weighted):
    features, y, ridge = problem(0, n, d, 2, device)
    weights = 3 * torch.rand(n, 1, dtype=torch.float64, device=device) if weighted else None
    posterior = fit(features, y, ridge, weights)
    left = leave_one_out(
        features[None], y[None], posterior, None if weights is None else weights[None]
    )
    for i in range(n):
        others = torch.arange(n, device=device) != i
        for k in range(2):
            w = None if weights is None else weights[others]
            other = refit(features[others], y[others, k], ridge[0, k], w)
            h = features[i]
            weight = 1.0 if weights is None else float(weights[i])
            rest = left.rest[0, i, k]
            if rest < 0.11:
                continue  # beyond the bound on leverages, which has a test of its own
            torch.testing.assert_close(left.residual[0, i, k], h @ other.mean[0] - y[i, k])
            excess = (1 / rest - 1) / weight
            torch.testing.assert_close(excess, h @ other.covariance[0] @ h)


@pytest.mark.parametrize("weighted", [False, True])
def test_is_the_expected_gradient_under_the_posterior_without_the_datum(device, weighted):
    features, y, ridge = problem(2, 20, 3, 2, device)
    noise = y.new_tensor([0.5, 4.0])
    weights = 2 * torch.rand(20, 1, dtype=torch.float64, device=device) if weighted else None
    gradient, ratio = gradient_of(features, y, fit(features, y, ridge, weights), noise, weights)
    for i in range(20):
        rest = torch.arange(20, device=device) != i
        for k in range(2):
            w = None if weights is None else weights[rest]
            other = refit(features[rest], y[rest, k], ridge[0, k], w).scaled(noise[k : k + 1])
            mean, _ = regression_moments(features[i : i + 1], y[i : i + 1, k : k + 1], other, 3)
            torch.testing.assert_close(gradient[i, k], mean[0, 0] * ratio[i, k])


def test_the_sum_over_outputs_is_that_of_the_outputs(device):
    features, y, ridge = problem(6, 9, 4, 5, device)
    noise, factor = torch.rand(5).to(y) + 0.1, torch.rand(9, 5).to(y)
    posterior = fit(features, y, ridge)
    left = leave_one_out(features[None], y[None], posterior)
    total, _ = student_gradient(left, posterior, 4, noise[None], factor[None], NU)
    each, _ = gradient_of(features, y, posterior, noise)
    torch.testing.assert_close(total[0], (each * factor[..., None]).sum(1))


def test_is_the_gradient_of_a_student_t_where_the_weights_are_certain(device):
    features, y, _ = problem(3, 8, 3, 2, device)
    noise = y.new_tensor([0.5, 4.0])
    mean = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0)).double().to(device)
    sure = Spectrum(torch.eye(4).to(y)[None], torch.full_like(mean, 1e-16), mean, mean[:, 0])
    gradient, _ = gradient_of(features, y, sure, noise)
    h = features.clone().requires_grad_()
    density = torch.distributions.StudentT(NU, h @ mean[0].mT, noise.sqrt())
    for k in range(2):
        nats = -density.log_prob(y)[:, k].sum()
        expected = torch.autograd.grad(nats, h, retain_graph=True)[0][:, :3]
        torch.testing.assert_close(gradient[:, k], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e6])
def test_does_not_depend_on_the_unit_of_a_label(device, unit):
    features, y, ridge = problem(4, 15, 3, 2, device)
    noise = y.new_tensor([0.5, 4.0])
    one, _ = gradient_of(features, y, fit(features, y, ridge), noise)
    other, _ = gradient_of(features, unit * y, fit(features, unit * y, ridge), unit**2 * noise)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=0)


def test_interpolated_data_have_finite_gradients(device):
    features, y, ridge = problem(5, 3, 6, 1, device, scale=1e3)
    gradient, _ = gradient_of(features, y, fit(features, y, 1e-30 * ridge), y.new_ones(1))
    assert bool(torch.isfinite(gradient).all())


def test_the_spectrum_is_the_posterior(device):
    features, y, ridge = problem(7, 12, 4, 3, device)
    posterior = fit(features, y, ridge)
    for k in range(3):
        dense = refit(features, y[:, k], ridge[0, k])
        assert isinstance(dense, Gaussian)
        torch.testing.assert_close(posterior.mean[0, k], dense.mean[0])
        vectors = posterior.vectors[0]
        covariance = vectors @ torch.diag(posterior.inverse[0, k]) @ vectors.mT
        torch.testing.assert_close(covariance, dense.covariance[0])


def test_no_evidence_at_all_is_the_prior(device):
    none = torch.zeros(1, 3, 3, dtype=torch.float64, device=device)
    posterior = Spectrum.of(none, none[:, :2], none.new_full((1, 2), 0.5))
    assert bool((posterior.mean == 0).all())
    torch.testing.assert_close(posterior.inverse, torch.full_like(posterior.inverse, 2.0))

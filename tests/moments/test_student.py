"""The Student-t gradient against its definition: refits without each datum, and autograd."""

from __future__ import annotations

import pytest
import torch

from bayesagg.moments import (
    leave_one_out,
    leave_one_out_residuals,
    regression_moments,
    student_gradient,
)
from bayesagg.posterior import Gaussian, augment, from_natural


def problem(seed, n, d, k, device, gamma=1.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, k, generator=generator, dtype=torch.float64)
    features = augment(h, True).to(device)
    return features, y.to(device), gamma


def fit(features, targets, gamma):
    precision = features.mT @ features + torch.eye(features.shape[1]).to(features) / gamma
    return from_natural(precision[None], targets.mT @ features)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (5, 3), (30, 4), (4, 9)])
def test_leave_one_out_equals_a_refit_without_the_datum(device, n, d):
    features, y, gamma = problem(0, n, d, 2, device, gamma=0.2)
    posterior = fit(features, y, gamma)
    r, u, excess, _ = leave_one_out(features, y, posterior)
    torch.testing.assert_close(leave_one_out_residuals(features, y, posterior), r)
    for i in range(n):
        rest = torch.arange(n, device=device) != i
        other = fit(features[rest], y[rest], gamma)
        h = features[i]
        if float(h @ posterior.covariance[0] @ h) > 0.89:
            continue  # beyond the bound on leverages, which has a test of its own
        torch.testing.assert_close(r[i], h @ other.mean.mT - y[i])
        torch.testing.assert_close(u[i, 0], other.covariance[0] @ h)
        torch.testing.assert_close(excess[i, 0], h @ other.covariance[0] @ h)


def test_missing_labels_have_a_covariance_each(device):
    features, y, gamma = problem(1, 12, 3, 2, device)
    parts = [fit(features[k:], y[k:, k : k + 1], gamma) for k in range(2)]
    both = Gaussian(torch.cat([p.mean for p in parts]), torch.cat([p.factor for p in parts]))
    noise = y.new_tensor([0.3, 2.0])
    gradient, factor = student_gradient(features, y, both, 3, noise)
    for k, part in enumerate(parts):
        g, f = student_gradient(features, y[:, k : k + 1], part, 3, noise[k : k + 1])
        torch.testing.assert_close(gradient[:, k], g[:, 0])
        torch.testing.assert_close(factor[:, k], f[:, 0])


def test_is_the_expected_gradient_under_the_posterior_without_the_datum(device):
    features, y, gamma = problem(2, 20, 3, 2, device)
    noise = y.new_tensor([0.5, 4.0])
    gradient, factor = student_gradient(features, y, fit(features, y, gamma), 3, noise)
    for i in range(20):
        rest = torch.arange(20, device=device) != i
        other = fit(features[rest], y[rest], gamma).scaled(noise)
        mean, _ = regression_moments(features[i : i + 1], y[i : i + 1], other, 3)
        torch.testing.assert_close(gradient[i], mean[0] * factor[i][:, None])


def test_is_the_gradient_of_a_student_t_where_the_weights_are_certain(device):
    features, y, _ = problem(3, 8, 3, 2, device)
    noise = y.new_tensor([0.5, 4.0])
    mean = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double().to(device)
    sure = Gaussian(mean, 1e8 * torch.eye(4, dtype=torch.float64, device=device)[None])
    gradient, _ = student_gradient(features, y, sure, 3, noise)
    h = features.clone().requires_grad_()
    density = torch.distributions.StudentT(10.0, h @ mean.mT, noise.sqrt())
    for k in range(2):
        nats = -density.log_prob(y)[:, k].sum()
        expected = torch.autograd.grad(nats, h, retain_graph=True)[0][:, :3]
        torch.testing.assert_close(gradient[:, k], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e6])
def test_does_not_depend_on_the_unit_of_a_label(device, unit):
    features, y, gamma = problem(4, 15, 3, 2, device)
    noise = y.new_tensor([0.5, 4.0])
    one, _ = student_gradient(features, y, fit(features, y, gamma), 3, noise)
    other, _ = student_gradient(
        features, unit * y, fit(features, unit * y, gamma), 3, unit**2 * noise
    )
    torch.testing.assert_close(one, other, rtol=1e-8, atol=0)


def test_interpolated_data_have_finite_gradients(device):
    features, y, _ = problem(5, 3, 6, 1, device, scale=1e3)
    gradient, _ = student_gradient(features, y, fit(features, y, 1e6), 6, y.new_ones(1))
    assert bool(torch.isfinite(gradient).all())

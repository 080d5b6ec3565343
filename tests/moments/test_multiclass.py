"""Multi-class moments: cubature over contrasts against samples and against fine grids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesagg.moments import binary_moments, multiclass_moments
from bayesagg.moments.multiclass import multiclass_log_moments
from bayesagg.posterior import Gaussian, contrast_basis
from tests import reference


def problem(seed, classes, d, bias, sd, logit_scale=1.0, feature_scale=1.0):
    """One datum and ``N(m, S)`` over ``vec W``, ``C·D``, with logits of spread about ``sd``."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal(d) * feature_scale
    h = np.append(h, 1.0) if bias else h
    m = rng.standard_normal((classes, len(h)))
    m *= logit_scale / max(np.linalg.norm(h), 1e-300)
    root = rng.standard_normal((m.size, m.size)) / m.size**0.5 + 0.5 * np.eye(m.size)
    s = root @ root.T
    read = np.kron(np.eye(classes), h)
    s *= sd**2 / max(np.trace(read @ s @ read.T) / classes, 1e-300)
    y = np.eye(classes)[rng.integers(classes)]
    return h, y, m.reshape(-1), s


def in_contrasts(m, s, classes, device):
    """The distribution of the contrasts of the class weights, as the library holds it."""
    basis = reference.numpy(contrast_basis(classes, torch.zeros(0, dtype=torch.float64)))
    lift = np.kron(basis, np.eye(len(m) // classes))
    precision = np.linalg.inv(lift @ s @ lift.T)
    mean, factor = (
        torch.tensor(a, device=device) for a in (lift @ m, np.linalg.cholesky(precision))
    )
    return Gaussian(mean[None], factor[None])


def moments(device, h, y, m, s, d, full=False):
    """The library's answer for one datum, as arrays."""
    features, targets = torch.tensor(h[None], device=device), torch.tensor(y[None], device=device)
    posterior = in_contrasts(m, s, len(y), device)
    first, second = multiclass_moments(features, targets, posterior, d, full)
    return reference.numpy(first)[0], reference.numpy(second)[0]


# Fewer have a finer reference below. Of eight the widest logits are left to Sobol points.
@pytest.mark.parametrize("classes", [5, 8])
def test_equals_many_samples(device, classes):
    d, scales = 2, (0.1, 1.0, 5.0)
    h, y, m, s = problem(classes, classes, d, True, 1.0)
    gradient = reference.multiclass_gradient(h, y, d)
    parts = {sd: [] for sd in scales}
    for seed in range(4):
        deviation = reference.sample(np.zeros_like(m), s, 100_000, seed)
        for sd in scales:
            parts[sd].append(gradient(m + sd * deviation))
    for sd in scales:
        mean, variance, mean_se, variance_se = reference.sampled_moments(np.concatenate(parts[sd]))
        first, second = moments(device, h, y, m, sd**2 * s, d)
        assert np.all(np.abs(first - mean) < 4.5 * mean_se), sd
        assert np.all(np.abs(second - variance) < 4.5 * variance_se), sd


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("sd", [0.03, 0.5, 0.7, 6.0])
@pytest.mark.parametrize("logit_scale", [0.5, 8.0])
def test_equals_a_fine_grid(device, classes, sd, logit_scale):
    h, y, m, s = problem(10 + classes, classes, 2, True, sd, logit_scale)
    mean, covariance = reference.multiclass_moments(h, y, m, s, 2, {3: 161, 4: 49}[classes])
    first, second = moments(device, h, y, m, s, 2)
    deviation = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(first - mean) <= 2e-3 * deviation + 1e-6 * np.abs(mean))
    np.testing.assert_allclose(second, np.diag(covariance), rtol=5e-3)
    _, full = moments(device, h, y, m, s, 2, full=True)
    assert np.all(np.abs(full - covariance) <= 5e-3 * np.outer(deviation, deviation))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 4),
    bias=st.booleans(),
    sd=st.sampled_from([1e-4, 0.1, 1.0, 10.0]),
    logit_scale=st.sampled_from([0.1, 3.0, 40.0]),
    feature_scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_two_classes_are_a_binary_task(device, seed, d, bias, sd, logit_scale, feature_scale):
    # Only w = w_1 - w_0 counts, and p_1 = σ(wᵀh).
    h, y, m, s = problem(seed, 2, d, bias, sd, logit_scale, feature_scale)
    width = len(h)
    difference = np.concatenate([-np.eye(width), np.eye(width)], axis=1)
    precision = np.linalg.inv(difference @ s @ difference.T)
    mean, factor, features, targets = (
        torch.tensor(a, device=device)
        for a in (difference @ m, np.linalg.cholesky(precision), h[None], [[y[1]]])
    )
    for full in (False, True):
        first, second = moments(device, h, y, m, s, d, full)
        expected = binary_moments(features, targets, Gaussian(mean[None], factor[None]), d, full)
        mean_, second_ = (reference.numpy(e)[0, 0] for e in expected)
        variance = second_.diagonal() if full else second_
        size = np.abs(mean_) + variance**0.5
        assert np.all(np.abs(first - mean_) <= 1e-6 * size + 1e-12 * np.abs(m).max())
        scale = np.outer(variance, variance) ** 0.5 if full else variance
        assert np.all(np.abs(second - second_) <= 1e-6 * scale + 1e-24 * s.max())


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 7),
    d=st.integers(1, 4),
    bias=st.booleans(),
    sd=st.sampled_from([1e-6, 1e-3, 0.5, 1.0, 30.0]),
    logit_scale=st.sampled_from([0.0, 1.0, 100.0]),
    feature_scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_variances_are_sane_at_any_scale(
    device, seed, classes, d, bias, sd, logit_scale, feature_scale
):
    h, y, m, s = problem(seed, classes, d, bias, sd, logit_scale, feature_scale)
    first, variance = moments(device, h, y, m, s, d)
    same, covariance = moments(device, h, y, m, s, d, full=True)
    assert np.isfinite(first).all() and np.isfinite(covariance).all()
    assert (variance >= 0).all()
    # |p - y| <= 1 in every class, so neither moment can exceed those of Σ_c |w_c|
    bound = 2 * classes * (m.reshape(classes, -1)[:, :d] ** 2).sum(0).max() + 2 * np.trace(s)
    assert (variance + first**2 <= bound * classes).all()
    np.testing.assert_allclose(first, same)
    size = np.abs(covariance).max() + 1e-30
    np.testing.assert_allclose(np.diag(covariance) / size, variance / size, atol=1e-6)
    assert np.linalg.eigvalsh(covariance / size).min() > -1e-6


@pytest.mark.parametrize("classes", [2, 3, 5, 8])
def test_without_uncertainty_it_is_the_gradient_at_the_mean(device, classes):
    h, y, m, s = problem(2, classes, 3, True, 1e-7, 2.0)
    weights = m.reshape(classes, -1)
    first, variance = moments(device, h, y, m, s, 3)
    expected = (reference.softmax(weights @ h) - y) @ weights[:, :3]
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    # Cov → J S Jᵀ with the gradient's Jacobian in the weights.
    p = reference.softmax(weights @ h)
    curvature = np.diag(p) - np.outer(p, p)
    jacobian = np.kron(p - y, np.eye(4)[:3]) + weights[:, :3].T @ np.kron(curvature, h)
    np.testing.assert_allclose(variance, np.diag(jacobian @ s @ jacobian.T), rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("full", [False, True])
def test_zero_features_without_bias(device, classes, full):
    # V = 0 exactly: p is uniform and certain, the weights are not.
    rng = np.random.default_rng(0)
    m, y = rng.standard_normal(classes * 3), np.eye(classes)[1]
    root = rng.standard_normal((classes * 3, classes * 3))
    s = root @ root.T + np.eye(classes * 3)
    first, second = moments(device, np.zeros(3), y, m, s, 3, full)
    residual = np.kron(1 / classes - y, np.eye(3))
    covariance = residual @ s @ residual.T
    np.testing.assert_allclose(first, residual @ m, rtol=1e-9)
    np.testing.assert_allclose(second, covariance if full else np.diag(covariance), rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_soft_targets_move_the_mean_linearly(device, classes):
    h, y, m, s = problem(8, classes, 3, True, 0.8)
    uniform = np.full(classes, 1 / classes)
    hard, flat, mixed = (moments(device, h, t, m, s, 3)[0] for t in (y, uniform, (y + uniform) / 2))
    np.testing.assert_allclose(mixed, (hard + flat) / 2, rtol=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_chunks_of_data_are_independent(device, monkeypatch, full):
    # Data with narrow and with wide logits, one by one and all together.
    classes, d = 3, 2
    _, _, m, s = problem(9, classes, d, True, 0.5)
    posterior = in_contrasts(m, s, classes, device)
    features = torch.randn(7, d + 1, dtype=torch.float64).to(device)
    features[::2] *= 5
    targets = torch.eye(classes, dtype=torch.float64, device=device)[torch.arange(7) % classes]
    together = multiclass_moments(features, targets, posterior, d, full)
    monkeypatch.setattr("bayesagg.moments.multiclass._CHUNK", 1)
    one_by_one = multiclass_moments(features, targets, posterior, d, full)
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("logit_scale", [1.0, 10.0, 60.0])
@pytest.mark.parametrize("sd", [0.1, 0.7, 3.0])
def test_single_precision_loses_nothing_but_digits(device, sd, logit_scale):
    """Also of saturated data, whose residuals have no square in single precision."""
    h, y, m, s = problem(3, 4, 3, True, sd, logit_scale)
    y = np.eye(4)[(m.reshape(4, -1) @ h).argmax()]
    posterior = in_contrasts(m, s, 4, device)
    features, targets = torch.tensor(h[None], device=device), torch.tensor(y[None], device=device)
    given = (features, targets, posterior, 3)
    one, other = (multiclass_log_moments(*given, dtype=t) for t in (torch.float32, torch.float64))
    size = other.mean.abs().max()
    assert float((one.mean - other.mean).abs().max()) <= 2e-4 * float(size) + 1e-30
    torch.testing.assert_close(one.relative.double(), other.relative, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(one.log_scale.double(), other.log_scale, rtol=1e-5, atol=2e-4)

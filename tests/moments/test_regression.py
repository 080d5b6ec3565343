"""Regression moments: the closed form against the paper's Eq. 4, which is exact to compare with.

That the reference is right: ``tests/test_theory.py``.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesagg.moments import regression_moments
from bayesagg.posterior import Gaussian
from tests import reference

SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6])


def random_factor(rng, groups, width):
    """Lower triangles of condition number well below 1e6."""
    lower = np.tril(rng.standard_normal((groups, width, width)), -1) / 2
    return lower + np.eye(width) * (1 + rng.random((groups, width, 1)))


def problem(seed, n, d, k, bias, shared, feature_scale=1.0, mean_scale=1.0, sd=1.0, y_scale=1.0):
    """Features, targets and a posterior of ``k`` outputs, as float64 tensors."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, d)) * feature_scale
    if bias:
        features = np.concatenate([features, np.ones((n, 1))], axis=1)
    width = d + bias
    factor = random_factor(rng, 1 if shared else k, width) / sd
    mean = rng.standard_normal((k, width)) * mean_scale
    targets = rng.standard_normal((n, k)) * y_scale
    return tuple(torch.tensor(a) for a in (features, targets, mean, factor))


def exact_moments(features, targets, mean, factor, d):
    """Eq. 4 in rational arithmetic, with the literal d×d matrices, rounded once at the end."""
    n, k = targets.shape
    first, second = np.empty((n, k, d)), np.empty((n, k, d, d))
    for j in range(k):
        lower = reference.exact(factor[min(j, len(factor) - 1)].numpy())
        s = reference.exact_inverse(lower @ lower.T)
        for i in range(n):
            h, y = reference.exact(features[i].numpy()), reference.exact(targets[i, j].numpy())[()]
            m = reference.exact(mean[j].numpy())
            first[i, j], second[i, j] = reference.regression_moments(h, y, m, s, d)
    return first, second


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3),
    d=st.integers(1, 4),
    k=st.integers(1, 3),
    bias=st.booleans(),
    shared=st.booleans(),
    feature_scale=SCALES | st.just(0.0),
    mean_scale=SCALES,
    sd=SCALES,
    y_scale=SCALES,
)
def test_equals_equation_4_at_any_scale(
    device, seed, n, d, k, bias, shared, feature_scale, mean_scale, sd, y_scale
):
    drawn = problem(seed, n, d, k, bias, shared, feature_scale, mean_scale, sd, y_scale)
    expected_mean, expected_cov = exact_moments(*drawn, d)
    features, targets, mean, factor = (t.to(device) for t in drawn)
    posterior = Gaussian(mean, factor)
    first, variance = regression_moments(features, targets, posterior, d)
    same, covariance = regression_moments(features, targets, posterior, d, full=True)

    expected_variance = np.diagonal(expected_cov, axis1=-2, axis2=-1)
    terms = np.abs(expected_mean) + np.sqrt(expected_variance)  # a mean of zero has no digits
    assert np.all(np.abs(reference.numpy(first) - expected_mean) <= 1e-9 * terms)
    np.testing.assert_allclose(reference.numpy(variance), expected_variance, rtol=1e-9)
    scale = np.sqrt(expected_variance[..., :, None] * expected_variance[..., None, :])
    assert np.all(np.abs(reference.numpy(covariance) - expected_cov) <= 1e-9 * scale)
    assert torch.equal(first, same)


def test_variance_is_not_negative_where_its_first_order_vanishes(device):
    # One dimension, y = 2hm: dg/dw = 0 at the mean, so only second-order terms remain.
    h = torch.logspace(-6, 6, 60, dtype=torch.float64, device=device)[:, None]
    for sd in (1e-9, 1e-3, 1.0):
        m = h.new_full((1, 1), 0.3)
        posterior = Gaussian(m, h.new_full((1, 1, 1), 1 / sd))
        _, variance = regression_moments(h, 2 * h * m, posterior, 1)
        exact = 8 * h[:, None] ** 2 * sd**4
        assert (variance >= 0).all()
        rounding = 1e-14 * h[:, None] ** 2 * sd**2
        assert ((variance - exact).abs() <= 1e-9 * exact + rounding).all()

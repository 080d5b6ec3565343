"""Binary moments: the nodes against fine composite rules and against sampling."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bayesagg.moments import binary_moments
from bayesagg.moments.nodes import _HERMITE
from bayesagg.posterior import Gaussian
from tests import reference


def problem(seed, d, bias, feature_scale, logit, sd, correlated=True):
    """One datum whose logit is ``N(logit, sd²)``: ``h̃``, mean and factor of the precision."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal(d) * feature_scale
    h = np.append(h, 1.0) if bias else h
    width = len(h)
    lower = np.tril(rng.standard_normal((width, width)), -1) / 2 * correlated
    factor = lower + np.diag(1 + rng.random(width))
    if sd > 0:
        factor = factor * (np.linalg.norm(np.linalg.solve(factor, h)) / sd)
    m = rng.standard_normal(width)
    m = m + h * (logit - h @ m) / (h @ h)
    return h, m, factor


def moments(device, h, y, m, factor, d, full=False):
    """The library's answer for one datum and one output, as arrays."""
    features, targets, mean, lower = (
        torch.tensor(a, dtype=torch.float64, device=device)
        for a in (h[None], [[y]], m[None], factor[None])
    )
    first, second = binary_moments(features, targets, Gaussian(mean, lower), d, full)
    return reference.numpy(first)[0, 0], reference.numpy(second)[0, 0]


def check(device, h, y, m, factor, d, tolerance=1e-3):
    """Mean, variance and covariance against the fine rule; relative, also in the far tails."""
    s = np.linalg.inv(factor @ factor.T)
    mean, covariance, terms = reference.binary_moments(h, y, m, s, d)
    variance = np.diag(covariance)
    size = m[:d] ** 2 + np.diag(s)[:d]
    # A tenth as exact where only the last 1e-10 counts (beyond six standard deviations);
    # nothing has digits that matter beyond thirteen.
    tolerance = np.where(variance > 1e-10 * size, tolerance, 10 * tolerance)
    floor = 1e-30 * size
    first, second = moments(device, h, y, m, factor, d)
    assert np.all(np.abs(first - mean) <= tolerance * terms + floor**0.5)
    assert np.all(second >= 0)
    assert np.all(np.abs(second - variance) <= tolerance * variance + floor)
    same, full = moments(device, h, y, m, factor, d, full=True)
    assert np.array_equal(first, same)
    bound = np.sqrt(tolerance * variance + floor)
    assert np.all(np.abs(full - covariance) <= np.outer(bound, bound))
    np.testing.assert_allclose(np.diag(full), second, rtol=1e-6, atol=floor.max())


@settings(max_examples=150)
@example(seed=0, d=2, bias=True, feature_scale=1.0, logit=0.0, log_sd=1.4, y=1.0)
@example(seed=0, d=2, bias=True, feature_scale=1.0, logit=40.0, log_sd=0.9, y=1.0)
@example(seed=0, d=2, bias=True, feature_scale=1.0, logit=-40.0, log_sd=0.31, y=1.0)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.integers(1, 4),
    bias=st.booleans(),
    feature_scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
    logit=st.floats(-100, 100),
    log_sd=st.floats(-6, 1.4771),
    y=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
)
def test_equals_a_fine_rule(device, seed, d, bias, feature_scale, logit, log_sd, y):
    h, m, factor = problem(seed, d, bias, feature_scale, logit, 10**log_sd)
    check(device, h, y, m, factor, d)


# The bounds between the rules, from either side; certain logits, under which the weights are not.
EDGES = [bound + side for bound, _ in _HERMITE for side in (-1e-9, 1e-9)]


@pytest.mark.parametrize("sd", [0.0, 1e-8, 1e-2, 0.5, 1.9, 2.1, 5.0, 12.0, 30.0, *EDGES])
def test_grid_of_wide_and_saturated_logits(device, sd):
    for logit in (-100.0, -20.0, 0.0, 3.0, 20.0, 100.0):
        h, m, factor = problem(7, 3, True, 1.0, logit, sd)
        h = h * (sd > 0)
        for y in (0.0, 0.3, 1.0):
            check(device, h, y, m, factor, 3)


@pytest.mark.parametrize("sd", [1e-2, 1.0, 4.0])
@pytest.mark.parametrize("logit", [3.0, 20.0, 30.0, 40.0])
def test_positive_and_negative_labels_are_mirror_images(device, logit, sd):
    # σ(z) - 1 cancels where σ(-z) does not: a saturated right answer must not depend on the class.
    h, m, factor = problem(3, 2, True, 1.0, logit, sd)
    positive = moments(device, h, 1.0, m, factor, 2)
    negative = moments(device, h, 0.0, -m, factor, 2)
    np.testing.assert_allclose(positive[0], negative[0], rtol=1e-6)
    np.testing.assert_allclose(positive[1], negative[1], rtol=1e-6)


@pytest.mark.parametrize("full", [False, True])
def test_several_data_and_outputs_are_independent(device, dtype, full):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 4, generator=generator).to(device, dtype)
    targets = torch.rand(5, 3, generator=generator).to(device, dtype)
    mean = (3 * torch.randn(3, 4, generator=generator)).to(device, dtype)
    factor = torch.randn(3, 4, 4, generator=generator).tril(-1) + 0.3 * torch.eye(4)
    factor = factor.to(device, dtype)  # logits of both rules, narrow and wide
    first, second = binary_moments(features, targets, Gaussian(mean, factor), 3, full)
    assert first.shape == (5, 3, 3)
    for i in range(5):
        for k in range(3):
            one = Gaussian(mean[k : k + 1], factor[k : k + 1])
            f, v = binary_moments(features[i : i + 1], targets[i : i + 1, k : k + 1], one, 3, full)
            torch.testing.assert_close(first[i, k], f[0, 0])
            torch.testing.assert_close(second[i, k], v[0, 0])

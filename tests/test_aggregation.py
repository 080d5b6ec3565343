"""Eq. 6 and Eq. 7 against the literal formulas; masks, extreme variances, the number of tasks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesagg.aggregation import aggregate_diagonal, aggregate_full, aggregate_relative
from tests import reference


def distributions(n, k, d, seed=0, scale=1.0):
    """Means ``[N, K, d]`` and covariances ``[N, K, d, d]`` of well-conditioned gradients."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, k, d, d)) + 2 * np.eye(d)
    return rng.standard_normal((n, k, d)), scale**2 * root @ root.swapaxes(-1, -2)


def diagonals(covariances):
    """``[N, K, d]`` of ``[N, K, d, d]``."""
    return np.diagonal(covariances, axis1=-2, axis2=-1)


def tensor(array, device, dtype=torch.float64):
    """An array as the library takes it."""
    return torch.tensor(np.asarray(array), dtype=dtype, device=device)


def on_arrays(aggregate, second_of):
    """An aggregation of the library as a function of arrays."""

    def call(device, means, second, s, present=None, scale="mean"):
        given = tensor(means, device), second_of(tensor(second, device)), tensor(s, device)
        mask = None if present is None else tensor(present, device, torch.bool)
        return tuple(map(reference.numpy, aggregate(*given, mask, scale)))

    return call


diagonal = on_arrays(aggregate_diagonal, torch.log)  # Eq. 7
full = on_arrays(aggregate_full, lambda covariances: covariances)  # Eq. 6
EXPONENTS = st.sampled_from([0.0, 5e-4, 0.25, 0.85, 1.0])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 4),
    d=st.integers(1, 4),
    s=st.lists(EXPONENTS, min_size=1, max_size=5),
    log_scale=st.floats(-12, 12),
)
def test_diagonal_equals_equation_7(device, seed, n, d, s, log_scale):
    means, covariances = distributions(n, len(s), d, seed, 10**log_scale)
    variances = diagonals(covariances)
    gradient, weights = diagonal(device, means, variances, s)
    for i in range(n):
        expected, alpha = reference.aggregate_diagonal(means[i], variances[i], s)
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(weights[i], alpha, rtol=1e-9)
    np.testing.assert_allclose(weights.sum(1), 1)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3),
    d=st.integers(1, 4),
    s=st.lists(EXPONENTS, min_size=1, max_size=4) | st.just([1.0, 1.0, 1.0]),
    log_scale=st.floats(-6, 6),
)
def test_full_equals_equation_6(device, seed, n, d, s, log_scale):
    means, covariances = distributions(n, len(s), d, seed, 10**log_scale)
    gradient, weights = full(device, means, covariances, s)
    for i in range(n):
        expected, shares = reference.aggregate_full(means[i], covariances[i], s)
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(weights[i], shares, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1)


@pytest.mark.parametrize("aggregate", [diagonal, full])
@pytest.mark.parametrize("masked", [False, True])
def test_sum_is_the_number_of_tasks_times_the_mean(device, aggregate, masked):
    means, covariances = distributions(6, 4, 3)
    second = diagonals(covariances) if aggregate is diagonal else covariances
    present = np.random.default_rng(0).random((6, 4)) < 0.6 if masked else None
    mean, weights = aggregate(device, means, second, [0.85] * 4, present)
    total, same = aggregate(device, means, second, [0.85] * 4, present, scale="sum")
    count = present.sum(1)[:, None] if masked else 4
    np.testing.assert_allclose(total, count * mean, rtol=1e-12)
    np.testing.assert_array_equal(weights, same)


@pytest.mark.parametrize("s", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("aggregate", [diagonal, full])
@pytest.mark.parametrize("absurd", [1e12, np.nan])
def test_absent_tasks_have_no_say(device, absurd, aggregate, s):
    means, covariances = distributions(8, 3, 2)
    present = np.array([[i & 1, i & 2, i & 4] for i in range(8)], dtype=bool)  # every pattern
    literal = reference.aggregate_diagonal if aggregate is diagonal else reference.aggregate_full
    second = diagonals(covariances).copy() if aggregate is diagonal else covariances
    second[~present] *= 1e-8  # absurdly confident, and absurd
    means[~present] = absurd
    gradient, weights = aggregate(device, means, second, [s] * 3, present)
    for i in range(8):
        rows = present[i]
        if not rows.any():
            assert not gradient[i].any() and not weights[i].any()
            continue
        expected, alpha = literal(means[i][rows], second[i][rows], [s] * int(rows.sum()))
        np.testing.assert_allclose(gradient[i], expected, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(weights[i][rows], alpha, rtol=1e-8, atol=1e-9)
        assert not weights[i][~rows].any()


def test_extreme_variance_ratios(device):
    # 1e300 to 1, in either direction and at both ends of the exponent's range.
    means = np.array([[[1.0], [5.0]]])
    for small, large in ((1e-300, 1.0), (1.0, 1e300), (1e-150, 1e150)):
        for s in (5e-4, 0.85, 1.0):
            variances = np.array([[[large], [small]]])
            gradient, weights = diagonal(device, means, variances, [s, s])
            alpha = 1 / (1 + 10 ** (300 * s))
            np.testing.assert_allclose(weights[0, :, 0], [alpha, 1 - alpha], rtol=1e-9)
            np.testing.assert_allclose(gradient, [[5 - 4 * alpha]], rtol=1e-12)


def test_log_variances_beyond_the_range_of_variances(device, dtype):
    means = torch.tensor([[[1.0], [2.0], [4.0]]], dtype=dtype, device=device)
    logs = torch.tensor([[[-5000.0], [0.0], [5000.0]]], dtype=dtype, device=device)
    s = torch.ones(3, dtype=dtype, device=device)
    gradient, weights = aggregate_diagonal(means, logs, s, None, "mean")
    assert weights[0, :, 0].tolist() == [1, 0, 0] and float(gradient) == 1
    gradient, _ = aggregate_diagonal(means, logs, 1e-5 * s, None, "mean")
    assert float(gradient) == pytest.approx(7 / 3, rel=0.05)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("s", [[0.3, 0.9, 0.0], 0.6, 0.0])
def test_a_variance_in_two_parts_is_their_product(device, s, masked):
    """Tasks innermost or outermost in memory; one exponent for all, or one each."""
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64).to(device)
    relative, log_scale = variance.exp(), 50 * variance[..., :1]
    present = torch.rand(5, 3, generator=generator).to(device) > 0.3 if masked else None
    each = torch.tensor(s, dtype=torch.float64, device=device).expand(3)
    expected = aggregate_diagonal(mean, variance + log_scale, each, present)
    for part in (relative.clone(), relative.transpose(0, 1).contiguous().transpose(0, 1)):
        exponent = each if isinstance(s, list) else s
        found = aggregate_relative(mean, part, log_scale, exponent, present)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("s", [0.4, 1.0])
@pytest.mark.parametrize("ratio", [1e-12, 1e-6, 1e6, 1e12])
def test_full_with_very_different_covariances(device, ratio, s):
    means, covariances = distributions(3, 2, 3)
    covariances[:, 1] = covariances[:, 0] * ratio  # so that the weights are scalars
    gradient, weights = full(device, means, covariances, [s, s])
    share = 1 / (1 + ratio**-s)
    np.testing.assert_allclose(weights[:, 0], np.full((3, 3), share), rtol=1e-6)
    expected = share * means[:, 0] + (1 - share) * means[:, 1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(means).max())


@pytest.mark.filterwarnings("ignore::bayesagg.errors.NumericalWarning")
@pytest.mark.parametrize("s", [0.4, 1.0])
def test_full_with_singular_covariances_stays_finite(device, s):
    # A rank-one covariance in each task: the certain directions decide.
    means, _ = distributions(1, 2, 2)
    covariances = np.array([[np.diag([1.0, 0.0]), np.diag([0.0, 1.0])]])
    gradient, weights = full(device, means, covariances, [s, s])
    assert np.isfinite(gradient).all() and np.isfinite(weights).all()
    np.testing.assert_allclose(gradient[0], [means[0, 1, 0], means[0, 0, 1]], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("s", [0.0, 0.4, 1.0])
def test_full_with_a_task_that_is_certain(device, s):
    # g = 0 for sure, as of a datum with h = 0 and y = 0 under a head without bias.
    means, covariances = distributions(2, 3, 2)
    means[0, 1], covariances[0, 1] = 0, 0
    gradient, weights = full(device, means, covariances, [s] * 3)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[0, 1], 1 if s else 1 / 3, rtol=1e-3)
    alone, _ = full(device, means[1:], covariances[1:], [s] * 3)
    np.testing.assert_allclose(gradient[1:], alone, rtol=1e-9)  # the other datum is untouched


def test_inputs_are_left_alone(device, dtype):
    means, covariances = (tensor(a, device, dtype) for a in distributions(2, 3, 2))
    logs = covariances.diagonal(dim1=-2, dim2=-1).log()
    s = torch.ones(3, dtype=dtype, device=device)
    present = torch.tensor([[True, False, True]] * 2, device=device)
    copies = [t.clone() for t in (means, covariances, logs, s, present)]
    aggregate_diagonal(means, logs, s, present)
    aggregate_full(means, covariances, s, present)
    assert all(map(torch.equal, copies, (means, covariances, logs, s, present)))

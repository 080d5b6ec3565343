"""Posteriors against Eq. 2 and autograd's Hessian; scales, ranks and jitter."""

import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayesagg.errors import NumericalError, NumericalWarning
from bayesagg.posterior import (
    Gaussian,
    augment,
    binary_statistics,
    contrast_basis,
    from_natural,
    multiclass_statistics,
    regression_statistics,
    weighted_gram,
)
from tests import reference


def data(n, d, outputs, device, dtype=torch.float64, seed=0, scale=1.0):
    """Features with the constant of a bias, and real labels."""
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(n, d, generator=generator, dtype=torch.float64)
    targets = torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    return augment(features, True).to(device, dtype), targets.to(device, dtype)


def regression(features, targets, prior_variance=1.0, tau2=1.0, present=None):
    """Isotropic prior and a batch, as the engine combines them."""
    precision, shift = regression_statistics(features, targets, present)
    eye = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    return from_natural(precision / tau2 + eye / prior_variance, shift / tau2)


def close(actual, expected, tolerance=1e-9):
    """Equal to ``tolerance`` of the largest entry."""
    actual = reference.numpy(actual) if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- the Gaussian itself -------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_gaussian_views_agree(device, groups):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(groups, 4, 4, generator=generator, dtype=torch.float64)
    precision = (root @ root.mT + torch.eye(4, dtype=torch.float64)).to(device)
    shift = torch.randn(3, 4, generator=generator, dtype=torch.float64).to(device)
    gaussian = from_natural(precision, shift)
    inverse = np.linalg.inv(reference.numpy(precision))
    close(gaussian.covariance, inverse)
    close(gaussian.whitener.mT @ gaussian.whitener, inverse)
    close(gaussian.variance, np.diagonal(inverse, axis1=1, axis2=2))
    close(gaussian.mean, (inverse @ reference.numpy(shift)[..., None])[..., 0])


@pytest.mark.parametrize("groups", [1, 2])
def test_samples_have_the_mean_and_covariance(device, dtype, groups):
    root = torch.tensor([[1.0, 0.0], [-0.7, 0.5]], dtype=dtype, device=device)
    factors = torch.stack([root, 2 * root])[:groups]
    mean = torch.tensor([[1.0, -2.0], [0.0, 5.0]], dtype=dtype, device=device)
    gaussian = Gaussian(mean, factors)
    count = 200_000
    draws = reference.numpy(gaussian.sample(count, torch.Generator(device).manual_seed(0)))
    covariances = reference.numpy(gaussian.covariance)
    for k in range(2):
        covariance = covariances[min(k, groups - 1)]
        deviation = np.sqrt(np.diag(covariance))
        error = np.abs(draws[:, k].mean(0) - reference.numpy(mean)[k])
        assert np.all(error < 5 * deviation / count**0.5)
        centred = draws[:, k] - draws[:, k].mean(0)
        error = np.abs(centred.T @ centred / count - covariance)
        assert np.all(error < 5 * 1.5 * np.outer(deviation, deviation) / count**0.5)
    assert abs(np.corrcoef(draws[:, 0, 0], draws[:, 1, 0])[0, 1]) < 0.02  # outputs independent


# --- regression, Eq. 2 ---------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 12),
    d=st.integers(1, 8),
    outputs=st.integers(1, 3),
    log_prior=st.floats(-3, 3),
    log_noise=st.floats(-3, 3),
)
def test_regression_equals_equation_2(device, seed, n, d, outputs, log_prior, log_noise):
    gamma, tau2 = 10**log_prior, 10**log_noise
    features, targets = data(n, d, outputs, device, seed=seed)
    posterior = regression(features, targets, gamma, tau2)
    assert posterior.covariance.shape == (1, d + 1, d + 1)  # one matrix for all outputs
    for k in range(outputs):
        mean, covariance = reference.regression_posterior(
            *(reference.numpy(t) for t in (features, targets[:, k])),
            np.zeros(d + 1),
            gamma * np.eye(d + 1),
            tau2,
        )
        close(posterior.mean[k], mean, 1e-8)
        close(posterior.covariance[0], covariance, 1e-8)


@pytest.mark.parametrize("outputs", [1, 3])
def test_missing_regression_labels_are_not_added(device, outputs):
    features, targets = data(12, 3, outputs, device)
    present = torch.rand(12, outputs, generator=torch.Generator().manual_seed(0)).to(device) > 0.4
    noisy = torch.where(present, targets, 1e6 * torch.ones_like(targets))
    posterior = regression(features, noisy, present=present)
    for k in range(outputs):
        rows = present[:, k]
        alone = regression(features[rows], targets[rows, k : k + 1])
        torch.testing.assert_close(posterior.mean[k], alone.mean[0])
        torch.testing.assert_close(posterior.covariance[k], alone.covariance[0])


# --- classification, Eq. 8-10 --------------------------------------------------------------------


@pytest.mark.parametrize("weight_scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("n", [1, 3, 25])
@pytest.mark.parametrize("soft", [False, True])
def test_binary_is_a_newton_step_on_autograds_hessian(device, n, weight_scale, soft):
    features, labels = data(n, 4, 2, device, seed=n)
    targets = torch.sigmoid(labels) if soft else (labels > 0).to(labels.dtype)
    weights = weight_scale * torch.randn(2, 5, dtype=torch.float64).to(device)
    precision, shift = binary_statistics(features, targets, features @ weights.mT)
    prior_mean, prior_cov = np.full(5, 0.3), 0.7 * np.eye(5)
    eye = torch.eye(5, dtype=torch.float64, device=device)
    posterior = from_natural(precision + eye / 0.7, shift + 0.3 / 0.7)
    for k in range(2):
        nll = reference.binary_nll(reference.numpy(features), reference.numpy(targets[:, k]))
        mean, covariance = reference.expanded_posterior(
            nll, reference.numpy(weights[k]), prior_mean, prior_cov
        )
        close(posterior.mean[k], mean)
        close(posterior.covariance[k], covariance)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_an_error_of_the_logits_enters_the_gradient_squared(device, kind):
    """That of the expansion, at ŵ, where it is the likelihood's if the logits are exact."""
    features, labels = data(40, 4, 3, device)
    targets = torch.softmax(labels, 1)
    weights = torch.randn(3, 5, dtype=torch.float64).to(device)
    logits, error = features @ weights.mT, torch.randn(40, 3, dtype=torch.float64).to(device)
    if kind == "binary":
        statistics, place, inverse = binary_statistics, weights, torch.sigmoid
        basis = torch.eye(3, dtype=torch.float64, device=device)
    else:
        statistics, inverse = multiclass_statistics, partial(torch.softmax, dim=1)
        basis = contrast_basis(3, features)
        place = (basis @ weights).reshape(-1)
    exact = (basis @ (inverse(logits) - targets).mT @ features).reshape(place.shape)
    off = []
    for size in (0.0, 1e-2, 1e-3):
        precision, shift = statistics(features, targets, logits + size * error)
        gradient = (precision @ place[..., None])[..., 0] - shift
        off.append(float((gradient - exact).norm() / exact.norm()))
    assert off[0] < 1e-12
    assert off[1] / off[2] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("weight_scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize(("classes", "n"), [(2, 1), (2, 9), (3, 2), (5, 20)])
@pytest.mark.parametrize("soft", [False, True])
def test_multiclass_is_a_newton_step_in_contrasts(device, classes, n, weight_scale, soft):
    # The reference holds all C·D weights, common mode included; the contrasts are its projection.
    d, gamma = 2, 0.7
    features, labels = data(n, d, classes, device, seed=n)
    targets = torch.softmax(labels, 1)
    if not soft:
        targets = torch.eye(classes, dtype=torch.float64, device=device)[labels.argmax(1)]
    weights = weight_scale * torch.randn(classes, d + 1, dtype=torch.float64).to(device)
    precision, shift = multiclass_statistics(features, targets, features @ weights.mT)
    eye = torch.eye(len(shift), dtype=torch.float64, device=device)
    posterior = from_natural((precision + eye / gamma)[None], shift[None])
    mean, covariance = reference.expanded_posterior(
        reference.multiclass_nll(reference.numpy(features), reference.numpy(targets)),
        reference.numpy(weights).reshape(-1),
        np.zeros(classes * (d + 1)),
        gamma * np.eye(classes * (d + 1)),
    )
    lift = np.kron(reference.numpy(contrast_basis(classes, features)), np.eye(d + 1))
    close(posterior.mean[0], lift @ mean)
    close(posterior.covariance[0], lift @ covariance @ lift.T)
    # and nothing couples the contrasts to the common mode, whose posterior is its prior
    common = np.kron(np.full((1, classes), classes**-0.5), np.eye(d + 1))
    close(common @ covariance @ common.T, gamma * np.eye(d + 1))
    assert np.abs(lift @ covariance @ common.T).max() < 1e-9 * gamma


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_contrast_basis_is_orthonormal_and_blind_to_the_common_mode(device, dtype, classes):
    basis = contrast_basis(classes, torch.zeros(0, dtype=dtype, device=device))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(classes - 1, dtype=dtype, device=device))
    assert basis.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_missing_class_labels_are_not_added(device, kind):
    features, labels = data(10, 3, 3, device)
    weights = torch.randn(3, 4, dtype=torch.float64).to(device)
    logits = features @ weights.mT
    rows = torch.arange(10, device=device) % 3 != 0
    if kind == "binary":
        targets = (labels > 0).to(labels.dtype)
        present = rows[:, None].expand(10, 3)
        actual = binary_statistics(features, targets, logits, present)
        expected = binary_statistics(features[rows], targets[rows], logits[rows])
    else:
        targets = torch.softmax(labels, 1)
        actual = multiclass_statistics(features, targets, logits, rows)
        expected = multiclass_statistics(features[rows], targets[rows], logits[rows])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("logit", [-300.0, -40.0, 40.0, 300.0])
def test_saturated_logits_add_no_negative_precision(device, dtype, logit):
    features = torch.ones(2, 1, dtype=dtype, device=device)
    weights = torch.full((1, 1), logit, dtype=dtype, device=device)
    target = features.new_tensor([[0.0], [1.0]])
    precision, shift = binary_statistics(features, target, features @ weights.mT)
    assert float(precision) >= 0 and torch.isfinite(shift).all()
    both = torch.cat([weights, -weights])
    one_hot = torch.eye(2, dtype=dtype, device=device)
    precision, shift = multiclass_statistics(features, one_hot, features @ both.mT)
    assert float(precision) >= 0 and torch.isfinite(shift).all()


# --- weighted_gram -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 20),
    d=st.integers(1, 6),
    k=st.integers(1, 4),
    chunk=st.sampled_from([1, 7, 30, 1 << 22]),
)
def test_weighted_gram_is_invariant_to_order_and_chunks(device, seed, n, d, k, chunk):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64).to(device)
    weights = torch.randn(n, k, generator=generator, dtype=torch.float64).to(device)
    expected = torch.stack([features.mT @ torch.diag(w) @ features for w in weights.mT])
    torch.testing.assert_close(weighted_gram(features, weights, chunk), expected)
    order = torch.randperm(n, generator=generator).to(device)
    torch.testing.assert_close(weighted_gram(features[order], weights[order], chunk), expected)


def test_weighted_gram_leaves_its_input_alone_and_takes_no_data(device, dtype):
    features = torch.randn(5, 2, dtype=torch.float64).to(device, dtype)
    weights = torch.ones(5, 3, dtype=dtype, device=device)
    before = features.clone()
    weighted_gram(features, weights, 1)
    assert torch.equal(features, before) and torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(weighted_gram(features[:0], weights[:0]), features.new_zeros(3, 2, 2))


# --- bad conditions ------------------------------------------------------------------------------


def solved(features, targets, prior_variance):
    """Regression posterior, and the amounts of jitter that were announced."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = regression(features, targets, prior_variance)
    assert all(w.category is NumericalWarning for w in caught)
    return posterior, [
        float(re.search(r"added jitter (\S+) times", str(w.message))[1]) for w in caught
    ]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("prior_variance", [1e-6, 1.0, 1e8, 1e30])
@pytest.mark.parametrize("columns", ["duplicated", "constant", "zero", "low rank"])
@pytest.mark.parametrize("n", [1, 3, 50])
def test_rank_deficient_features_warn_or_are_finite(device, n, columns, prior_variance, scale):
    features, targets = data(n, 6, 2, device, scale=scale)
    if columns == "duplicated":
        features[:, 1] = features[:, 0]
    elif columns == "constant":
        features[:, :3] = scale
    elif columns == "zero":
        features[:, :6] = 0
    else:
        features[:, 2:6] = features[:, :2] @ features.new_tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    posterior, jitters = solved(features, targets, prior_variance)
    assert torch.isfinite(posterior.mean).all() and torch.isfinite(posterior.variance).all()
    assert (posterior.variance > 0).all()
    # The solution fits as well as the best one: jitter must not show where labels were learned.
    h, y = reference.numpy(features), reference.numpy(targets)
    root = np.concatenate([h, prior_variance**-0.5 * np.eye(7)])
    best = np.linalg.lstsq(root, np.concatenate([y, np.zeros((7, 2))]), rcond=None)[0]
    fitted = h @ reference.numpy(posterior.mean).T
    allowed = 1e-6 if not jitters else 1e-2
    assert np.abs(fitted - h @ best).max() <= allowed * np.abs(y).max()


def test_jitter_is_announced_with_its_amount(device):
    ones = torch.ones(1, 3, 3, dtype=torch.float64, device=device) * 5
    with pytest.warns(NumericalWarning) as caught:
        posterior = from_natural(ones, ones[:, 0])
    message = str(caught[0].message)
    relative, amount = map(
        float, re.search(r"added jitter (\S+) times .*at most (\S+)\)", message).groups()
    )
    assert amount == pytest.approx(5 * relative, rel=1e-2)
    expected = 5 * torch.ones(3, 3, dtype=torch.float64) + amount * torch.eye(3)
    close(posterior.factor[0] @ posterior.factor[0].mT, reference.numpy(expected))
    assert "prior_variance" in message  # and says what to do


def test_jitter_goes_only_where_it_is_needed(device):
    good = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64, device=device)
    precision, shift = torch.stack([torch.ones_like(good), good]), torch.ones_like(good)
    with pytest.warns(NumericalWarning):
        posterior = from_natural(precision, shift)
    alone = from_natural(good[None], shift[1:])
    assert torch.equal(posterior.factor[1], alone.factor[0])
    torch.testing.assert_close(posterior.mean[1], alone.mean[0])


def test_hopeless_precision_is_an_error(device):
    indefinite = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64, device=device)
    with pytest.raises(NumericalError, match="prior_variance"):
        from_natural(indefinite, indefinite[:, 0])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_more_dimensions_than_data_and_extreme_scales(device, scale):
    for n in (1, 4):
        features, targets = data(n, 30, 2, device, scale=scale)
        posterior, jitters = solved(features, targets, 1.0)
        assert not jitters
        # Woodbury's form inverts N×N matrices only: exact where the other is ill-conditioned.
        h, y = reference.numpy(features), reference.numpy(targets)
        inner = np.linalg.inv(h @ h.T + np.eye(n))
        close(h @ reference.numpy(posterior.mean).T, h @ h.T @ inner @ y, 1e-7)
        error = np.abs(reference.numpy(posterior.mean) - (h.T @ inner @ y).T)
        assert np.all(error < 1e-6 * reference.numpy(posterior.variance) ** 0.5 + 1e-9)
        predictive = h @ reference.numpy(posterior.covariance[0]) @ h.T
        close(predictive, h @ h.T - h @ h.T @ inner @ h @ h.T, 1e-4 if scale < 10 else 1e-1)

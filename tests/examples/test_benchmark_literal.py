"""The benchmark's literal formulas: right, and the same as the library's closed forms."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bayesagg.aggregation import aggregate_diagonal
from bayesagg.moments import binary_moments, multiclass_moments, regression_moments
from bayesagg.posterior import (
    Gaussian,
    augment,
    binary_statistics,
    contrast_basis,
    from_natural,
    multiclass_statistics,
    regression_statistics,
)
from examples.benchmark import aggregation, literal
from examples.benchmark.cases import CASES

B, D_FEATURES, SAMPLES = 5, 4, 200_000
D = D_FEATURES + 1


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def _spd(size: int) -> Tensor:
    root = torch.randn(size, 2 * size)
    return root @ root.T / (2 * size) + 0.5 * torch.eye(size)


def _prior(size: int) -> tuple[Tensor, Tensor]:
    """Inverse of the covariance of a random prior, and mean."""
    return torch.linalg.inv(_spd(size)), torch.randn(size)


def _assert_same(posterior: Gaussian, expected: literal.Gaussian) -> None:
    torch.testing.assert_close(posterior.mean.flatten(), expected.mean.flatten())
    torch.testing.assert_close(torch.block_diag(*posterior.covariance), expected.covariance)


def _assert_sampled(moments: literal.Moments, mean: Tensor, variance: Tensor) -> None:
    error = (moments.mean - mean).abs()
    assert (error < 5 * (variance / SAMPLES).sqrt() + 1e-12).all()
    torch.testing.assert_close(moments.variance, variance, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("softmax", [False, True])
def test_chunks_do_not_change_the_result(monkeypatch, softmax):
    h, y = torch.randn(B, D_FEATURES), torch.eye(3)[torch.randint(3, (B,))]
    posterior = literal.Gaussian(torch.randn(3 * D), _spd(3 * D))
    moments = []
    for size in (literal.CHUNK_BYTES, 1):
        monkeypatch.setattr(literal, "CHUNK_BYTES", size)
        torch.manual_seed(1)
        moments.append(literal.classification_moments(h, y, posterior, 50, softmax))
    torch.testing.assert_close(moments[0].mean, moments[1].mean)
    torch.testing.assert_close(moments[0].variance, moments[1].variance)


def test_regression_equals_the_library():
    h, y, prior_inv = torch.randn(B, D_FEATURES), torch.randn(B, 3), torch.linalg.inv(_spd(D))
    prior_mean = torch.randn(3, D)
    precision, shift = regression_statistics(augment(h, True), y)
    posterior = from_natural(precision + prior_inv, shift + prior_mean @ prior_inv)
    expected = literal.regression_posterior(h, y, prior_inv, prior_mean)
    _assert_same(posterior, expected)

    mean, variance = regression_moments(augment(h, True), y, posterior, D_FEATURES)
    moments = literal.regression_moments(h, y, expected)
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.variance, variance)


def test_binary_equals_the_library():
    x, y = torch.randn(B, D_FEATURES), torch.randint(2, (B, 2)).double()
    weight, h = torch.randn(2, D), augment(x, True)
    inverses, means = zip(*(_prior(D) for _ in range(2)), strict=True)
    precision, shift = binary_statistics(h, y, h @ weight.T)
    prior_shift = torch.stack([inv @ mean for mean, inv in zip(means, inverses, strict=True)])
    posterior = from_natural(precision + torch.stack(inverses), shift + prior_shift)
    prior = (torch.block_diag(*inverses), torch.cat(means))
    expected = literal.classification_posterior(x, y, weight, *prior, False)
    _assert_same(posterior, expected)

    mean, variance = binary_moments(h, y, posterior, D_FEATURES)
    moments = literal.classification_moments(x, y, expected, SAMPLES, False)
    _assert_sampled(moments, mean, variance)


def test_multiclass_equals_the_library():
    """In the contrasts of the classes: nothing else reaches the likelihood or the gradient."""
    x, y, classes = torch.randn(B, D_FEATURES), torch.eye(3)[torch.randint(3, (B,))], 3
    weight, h = torch.randn(classes, D), augment(x, True)
    precision, shift = multiclass_statistics(h, y, h @ weight.T)
    posterior = from_natural((precision + torch.eye(2 * D))[None], shift[None])
    prior = (torch.eye(classes * D), torch.zeros(classes * D))
    expected = literal.classification_posterior(x, y, weight, *prior, True)
    contrasts = torch.kron(contrast_basis(classes, h).contiguous(), torch.eye(D))
    covariance = contrasts @ expected.covariance @ contrasts.T
    _assert_same(posterior, literal.Gaussian(contrasts @ expected.mean, covariance))

    mean, variance = multiclass_moments(h, y, posterior, D_FEATURES)
    moments = literal.classification_moments(x, y, expected, SAMPLES, True)
    _assert_sampled(moments, mean[:, None], variance[:, None])


def test_equation_7_equals_the_library():
    moments = [
        literal.Moments(torch.randn(B, k, D_FEATURES), torch.rand(B, k, D_FEATURES) + 0.1)
        for k in (2, 1)
    ]
    mean = torch.cat([part.mean for part in moments], 1)
    log_variance = torch.cat([part.variance for part in moments], 1).log()
    s = torch.tensor([0.85, 0.85, 0.1])
    gradient, _ = aggregate_diagonal(mean, log_variance, s, scale="mean")
    torch.testing.assert_close(literal.aggregate(moments, [0.85, 0.1]), gradient)


@pytest.mark.parametrize("name", ["regressions", "mixture"])
def test_arms_of_the_benchmark_agree(name):
    """The library's gradient at h is what the printed formulas give for the same batch."""
    torch.set_default_dtype(torch.float32)
    problem = aggregation.make_problem(replace(CASES[name], batch=6, dim=4))
    ours, theirs = aggregation.run_library(problem), aggregation.run_literal(problem, 50_000)
    torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=float(0.02 * theirs.norm()))

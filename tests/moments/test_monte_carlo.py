"""Eq. 11 against its own definition, and its convergence to quadrature and cubature."""

import numpy as np
import pytest
import torch

from bayesagg.moments import monte_carlo_moments
from bayesagg.posterior import Gaussian, contrast_basis
from tests import reference

D_SHARED, DATA = 3, 4


def problem(kind, device, dtype, seed=0, scale=1.0):
    """Features, targets as Monte-Carlo takes them, and a posterior: 2 outputs, or 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(DATA, D_SHARED + 1, generator=generator, dtype=torch.float64)
    if kind == "binary":
        targets = torch.rand(DATA, 2, generator=generator, dtype=torch.float64).round()
        tasks, width = 2, D_SHARED + 1
    else:
        targets = torch.eye(3, dtype=torch.float64)[torch.arange(DATA) % 3][:, None]
        tasks, width = 1, 2 * (D_SHARED + 1)
    mean = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    factor = torch.randn(tasks, width, width, generator=generator, dtype=torch.float64).tril(-1) / 2
    factor = (factor + 2 * torch.eye(width, dtype=torch.float64)) / scale
    tensors = [t.to(device, dtype) for t in (features, targets, mean, factor)]
    return tensors[0], tensors[1], Gaussian(tensors[2], tensors[3])


def gradients_of(kind, features, targets, weights):
    """``g`` of every sample, datum and task from sampled weights, by the definition."""
    samples = reference.numpy(weights)
    h, y = reference.numpy(features), reference.numpy(targets)
    if kind == "multiclass":
        basis = reference.numpy(contrast_basis(3, features))
        lift = np.kron(basis.T, np.eye(h.shape[1]))
        samples = samples @ lift.T
        make = reference.multiclass_gradient
    else:
        make = reference.binary_gradient
    return np.stack(
        [
            np.stack(
                [make(h[i], y[i, k], D_SHARED)(samples[:, k]) for k in range(samples.shape[1])], 1
            )
            for i in range(len(h))
        ],
        1,
    )  # [J, N, K, d]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_is_equation_11_of_the_drawn_weights(device, dtype, kind, full):
    features, targets, posterior = problem(kind, device, dtype)
    draw = torch.Generator(device).manual_seed(5)
    first, second = monte_carlo_moments(features, targets, posterior, D_SHARED, 50, draw, full)
    weights = posterior.sample(50, torch.Generator(device).manual_seed(5))
    g = gradients_of(kind, features, targets, weights)
    mean = g.mean(0)
    square = np.einsum("jnkd,jnke->nkde", g, g) / 50 - mean[..., :, None] * mean[..., None, :]
    expected = square if full else np.diagonal(square, axis1=-2, axis2=-1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(reference.numpy(first), mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(reference.numpy(second), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_generator_decides_the_samples_which_chunks_of_data_share(device, dtype, kind, monkeypatch):
    problem_ = problem(kind, device, dtype)

    def run(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return monte_carlo_moments(*problem_, D_SHARED, 20, generator)

    whole = run(0)
    assert torch.equal(run(0)[0], whole[0]) and not torch.equal(run(1)[0], whole[0])
    monkeypatch.setattr("bayesagg.moments.monte_carlo._CHUNK", 1)
    torch.testing.assert_close(run(0), whole)


@pytest.mark.parametrize("logit", [-300.0, 300.0])
def test_saturated_logits_stay_finite(device, dtype, logit):
    features = torch.ones(1, 2, device=device, dtype=dtype)
    mean = torch.full((1, 2), logit / 2, device=device, dtype=dtype)
    posterior = Gaussian(mean, 100 * torch.eye(2, device=device, dtype=dtype)[None])
    for target in (0.0, 1.0):
        targets = features.new_full((1, 1), target)
        first, second = monte_carlo_moments(features, targets, posterior, 1, 16)
        assert torch.isfinite(first).all() and torch.isfinite(second).all()
        assert (second >= 0).all()

"""The misprints that docs/theory.md lists: the formula as printed is wrong, as corrected right."""

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss

from tests import reference

RNG = np.random.default_rng(0)
D = 3
ROOT = RNG.standard_normal((D, D))
S, M, H, Y = ROOT @ ROOT.T, RNG.standard_normal(D), RNG.standard_normal(D), 1.7


def expectation(function):
    """``E[f(w)]`` for ``w ~ N(M, S)``, exact for polynomials of degree 9."""
    x, weight = hermegauss(5)
    grid = np.stack(np.meshgrid(*[x] * D, indexing="ij"), -1).reshape(-1, D)
    weights = np.prod(np.meshgrid(*[weight / weight.sum()] * D, indexing="ij"), 0).ravel()
    return sum(p * function(w) for p, w in zip(weights, M + grid @ ROOT.T, strict=True))


def second_moment(printed):
    """Eq. 4, with -2y before the first of three terms (as printed) or before all."""
    mm, a = np.outer(M, M), np.outer(H, H)
    first = np.outer(M, H @ (S + mm))
    others = np.outer((S + mm) @ H, M) + (H @ M) * (S - mm)
    cubic = -2 * Y * first + others if printed else -2 * Y * (first + others)
    quartic = (S + mm) @ (a + a.T) @ (S + mm)
    quartic += np.trace(a @ S) * (S + mm) + (M @ a @ M) * (S - mm)
    return 4 * (Y**2 * (S + mm) + cubic + quartic)


def test_the_bracket_of_eq_4_closes_too_early():
    def gradient(w):
        return 2 * w * (H @ w - Y)

    exact = expectation(lambda w: np.outer(gradient(w), gradient(w)))
    assert np.allclose(second_moment(printed=False), exact, rtol=1e-10)
    assert not np.allclose(second_moment(printed=True), exact, rtol=0.1)
    covariance = exact - np.outer(expectation(gradient), expectation(gradient))
    assert np.allclose(reference.regression_moments(H, Y, M, S, D)[1], covariance, rtol=1e-9)


@pytest.mark.parametrize(("half", "right"), [(0.5, True), (1.0, False)], ids=["with", "printed"])
def test_the_constant_of_eq_16_lacks_one_half(half, right):
    a, at, w, c = (*RNG.standard_normal((3, D)), 0.3)
    shift = S @ at - a
    constant = c - a @ at + at @ S @ at / 2 - half * shift @ np.linalg.solve(S, shift)
    off = w - (at - np.linalg.solve(S, a))
    expansion = c + a @ (w - at) + (w - at) @ S @ (w - at) / 2
    assert np.isclose(constant + off @ S @ off / 2, expansion) == right
    assert np.isclose(constant, c - a @ np.linalg.solve(S, a) / 2) == right

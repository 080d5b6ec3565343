"""Naive, literal versions of the paper's equations, and a model whose representation is free.

Nothing in the first part is fast or shares code with the library: matrices are inverted, Hessians
come from autograd, expectations from plain sampling or very fine grids, one datum and one task at
a time, on the CPU in float64. ``h`` is a feature vector *with* the constant of the bias appended
where there is one, ``w ~ N(m, S)`` includes the bias, and ``d`` says how many leading coordinates
are shared dimensions, with respect to which gradients are taken.

Misprints of the paper that were found by checking each formula against sampling:

* Eq. 4, second moment: a bracket closes too early. ``-2y`` multiplies all three terms of
  ``E[w (hᵀw) wᵀ] = m hᵀ(S + M) + (S + M) h mᵀ + hᵀm (S - M)`` (Eq. 14, first two lines, is right),
  not the first one only. The other terms of Eq. 4 and of Eq. 14 are right as printed.
* Eq. 13: ``y² w wᵀ h`` is to be read ``y² w wᵀ`` (a vector cannot be added to matrices).
* Eq. 15 defines ``a`` and ``B`` as derivatives of the *negative* log-posterior, so that the two
  signs in Eq. 16 are those of ``-log p``; Eq. 9 follows all the same.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from scipy.linalg import fractional_matrix_power, null_space
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg.posterior import contrast_basis

Array = np.ndarray[Any, Any]


# --- Eq. 2, 8-10: posteriors ---------------------------------------------------------------------


def regression_posterior(
    features: Array, y: Array, prior_mean: Array, prior_cov: Array, tau2: float = 1.0
) -> tuple[Array, Array]:
    """Eq. 2 for one output: mean ``[D]`` and covariance ``[D, D]``."""
    prior_precision = np.linalg.inv(prior_cov)
    precision = prior_precision + features.T @ features / tau2
    mean = np.linalg.solve(precision, prior_precision @ prior_mean + features.T @ y / tau2)
    return mean, np.linalg.inv(precision)


def binary_nll(features: Array, y: Array) -> Callable[[Tensor], Tensor]:
    """``-log p(y | w)`` of one binary output, as a function of ``w`` ``[D]``."""
    h, target = torch.tensor(features), torch.tensor(y)
    return lambda w: F.binary_cross_entropy_with_logits(h @ w, target, reduction="sum")


def multiclass_nll(features: Array, y: Array) -> Callable[[Tensor], Tensor]:
    """``-log p(y | W)`` as a function of ``vec W`` ``[C·D]``, class major; ``y`` are ``[N, C]``."""
    h, target = torch.tensor(features), torch.tensor(y)

    def nll(w: Tensor) -> Tensor:
        logits = h @ w.view(target.shape[1], h.shape[1]).T
        return F.cross_entropy(logits, target, reduction="sum")

    return nll


def expanded_posterior(
    nll: Callable[[Tensor], Tensor], at: Array, prior_mean: Array, prior_cov: Array
) -> tuple[Array, Array]:
    """Eq. 8-10 by autograd: ``N(ŵ - B⁻¹a, B⁻¹)``. For a linear head B is the GGN, exactly."""
    centre, precision = torch.tensor(prior_mean), torch.tensor(np.linalg.inv(prior_cov))

    def negative_log_posterior(w: Tensor) -> Tensor:
        return nll(w) + (w - centre) @ precision @ (w - centre) / 2

    w = torch.tensor(at)
    a = torch.autograd.functional.jacobian(negative_log_posterior, w)
    b = torch.autograd.functional.hessian(negative_log_posterior, w)
    covariance = torch.linalg.inv(b)
    return (w - covariance @ a).numpy(), covariance.numpy()


def contrasts(num_classes: int) -> Array:
    """Any orthonormal rows that are orthogonal to the vector of ones, ``[C - 1, C]``."""
    basis: Array = null_space(np.ones((1, num_classes))).T
    return basis


# --- Eq. 4: moments of a squared error -----------------------------------------------------------


def exact(values: Array) -> Array:
    """The same numbers as fractions, for which the functions below round nothing."""
    fractions: Array = np.vectorize(Fraction, otypes=[object])(values)
    return fractions


def exact_inverse(matrix: Array) -> Array:
    """Inverse of a matrix of fractions by Gauss-Jordan elimination."""
    n = len(matrix)
    rows = np.concatenate([matrix, exact(np.eye(n))], axis=1)
    for i in range(n):
        pivot = next(j for j in range(i, n) if rows[j, i] != 0)
        rows[[i, pivot]] = rows[[pivot, i]]
        rows[i] = rows[i] / rows[i, i]
        for j in range(n):
            if j != i:
                rows[j] = rows[j] - rows[j, i] * rows[i]
    return rows[:, n:]


def regression_moments(h: Array, y: Any, m: Array, s: Array, d: int) -> tuple[Array, Array]:
    """Eq. 4 term by term, bracket corrected: ``E[g]`` ``[d]`` and ``Cov[g]`` ``[d, d]``."""
    a, mm = np.outer(h, h), np.outer(m, m)
    first = 2 * (s @ h + m * (h @ m - y))
    third = np.outer(m, h @ (s + mm)) + np.outer((s + mm) @ h, m) + (h @ m) * (s - mm)
    fourth = (s + mm) @ (a + a.T) @ (s + mm) + np.trace(a @ s) * (s + mm) + (m @ a @ m) * (s - mm)
    second = 4 * (y**2 * (s + mm) - 2 * y * third + fourth)
    return first[:d], (second - np.outer(first, first))[:d, :d]


# --- Eq. 11: moments of a cross-entropy, by sampling and on fine grids ---------------------------


def binary_gradient(h: Array, y: float, d: int) -> Callable[[Array], Array]:
    """``∂ℓ/∂h`` of the binary cross-entropy, for weights ``[J, D]``."""
    return lambda w: (sigmoid(w @ h) - y)[:, None] * w[:, :d]


def multiclass_gradient(h: Array, y: Array, d: int) -> Callable[[Array], Array]:
    """``∂ℓ/∂h`` of the cross-entropy, for weights ``[J, C·D]``."""

    def gradient(w: Array) -> Array:
        classes = w.reshape(len(w), len(y), len(h))
        residual = softmax(classes @ h) - y
        return (residual[:, None, :] @ classes[:, :, :d])[:, 0]

    return gradient


def sample(m: Array, s: Array, count: int, seed: int) -> Array:
    """``count`` draws from ``N(m, S)``, ``[count, M]``."""
    noise = np.random.default_rng(seed).standard_normal((count, len(m)))
    return m + noise @ np.linalg.cholesky(s).T


def sampled_moments(gradients: Array) -> tuple[Array, Array, Array, Array]:
    """Eq. 11 from sampled gradients ``[J, d]``: mean, variance, and the standard error of each."""
    mean = gradients.mean(0)
    square = (gradients - mean) ** 2
    variance, root = square.mean(0), len(gradients) ** 0.5
    return mean, variance, variance**0.5 / root, square.std(0) / root


def sigmoid(z: Array) -> Array:
    """Logistic function."""
    value: Array = torch.sigmoid(torch.as_tensor(z)).numpy()
    return value


def softmax(z: Array) -> Array:
    """Softmax over the last dimension."""
    value: Array = torch.softmax(torch.as_tensor(z), -1).numpy()
    return value


def panels(edges: Array, nodes: int = 20) -> tuple[Array, Array]:
    """Composite Gauss-Legendre rule between consecutive ``edges``."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = np.diff(edges) / 2
    points = (edges[:-1] + half)[:, None] + half[:, None] * x
    return points.ravel(), (half[:, None] * w).ravel()


def binary_moments(h: Array, y: float, m: Array, s: Array, d: int) -> tuple[Array, Array, Array]:
    """Eq. 11 with infinitely many samples: ``E[g]``, ``Cov[g]``, and the size of ``E[g]``'s terms.

    The integral over the logit takes a composite rule of 2,000 nodes, fine where the density or
    the sigmoid moves; the weights given the logit are normal.
    """
    u, centre = s @ h, m @ h
    v = h @ u
    sd = max(v, 0.0) ** 0.5
    if sd == 0:
        e = float(sigmoid(np.array(centre)) - y)
        return e * m[:d], e**2 * s[:d, :d], np.abs(e * m[:d])
    # In x = (z - centre) / sd, which keeps its digits where sd is far below the logit.
    middle = np.clip((np.linspace(-40, 40, 41) - centre) / sd, -14, 14)
    x, weight = panels(np.union1d(np.linspace(-14, 14, 57), middle))
    weight = weight * np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5
    z, rho = centre + sd * x, u / sd
    # σ(z) - y without cancellation in either tail
    e = (1 - y) * sigmoid(z) - y * sigmoid(-z)
    given = m[:d] + np.outer(x, rho[:d])  # E[w | z]
    mean = (weight * e) @ given
    spread = s[:d, :d] - np.outer(rho[:d], rho[:d])  # Cov(w | z)
    deviation = e[:, None] * given - mean
    covariance = (deviation * weight[:, None]).T @ deviation + (weight @ e**2) * spread
    return mean, covariance, (weight * np.abs(e)) @ np.abs(given)


def multiclass_moments(
    h: Array, y: Array, m: Array, s: Array, d: int, points: int = 121
) -> tuple[Array, Array]:
    """Eq. 11 with infinitely many samples, for weights ``vec W ~ N(m, S)`` over ``C·D``.

    Trapezoidal rule (which converges geometrically for such integrands) over the ``C - 1``
    contrasts of the logits; ``points`` in each direction, so for three or four classes only.
    """
    basis = contrasts(len(y))
    lift = np.kron(basis, np.eye(len(h)))
    read = np.kron(np.eye(len(basis)), h)  # contrast weights to contrasts of the logits
    mean, cov = lift @ m, lift @ s @ lift.T
    v = read @ cov @ read.T
    root = np.linalg.cholesky(v)
    x = np.linspace(-8.5, 8.5, points)
    grid = np.stack(np.meshgrid(*[x] * len(basis), indexing="ij"), -1).reshape(-1, len(basis))
    weight = np.exp(-(grid**2).sum(1) / 2)
    weight /= weight.sum()
    t = read @ mean + grid @ root.T
    rho = (softmax(t @ basis) - y) @ basis.T
    select = np.eye(len(h))[:d]
    to_shared = np.stack([np.kron(row[None], select) for row in np.eye(len(basis))])  # [E, d, E·D]
    gain = cov @ read.T @ np.linalg.inv(root).T  # Cov(b, ε), [E·D, E]
    given = mean + grid @ gain.T
    rest = cov - gain @ gain.T
    columns = np.einsum("edm,nm->ned", to_shared, given)
    g = np.einsum("ne,ned->nd", rho, columns)
    first = weight @ g
    second = (rho * weight[:, None]).T @ rho
    conditional = np.einsum("ef,edm,mn,fcn->dc", second, to_shared, rest, to_shared)
    return first, ((g - first) * weight[:, None]).T @ (g - first) + conditional


# --- Eq. 6, 7: aggregation -----------------------------------------------------------------------


def aggregate_diagonal(means: Array, variances: Array, s: Array) -> tuple[Array, Array]:
    """Eq. 7 with exponent for one datum: ``[K, d]`` to ``g`` ``[d]`` and ``α`` ``[K, d]``."""
    power = (1 / variances) ** np.asarray(s)[:, None]
    alpha = power / power.sum(0)
    return (alpha * means).sum(0), alpha


def aggregate_full(means: Array, covariances: Array, s: Array) -> tuple[Array, Array]:
    """Eq. 6 with matrix powers and explicit inverses, for one datum: ``[K, d]``, ``[K, d, d]``."""
    precisions = [
        np.real(fractional_matrix_power(np.linalg.inv(c), p))
        for c, p in zip(covariances, s, strict=True)
    ]
    total = np.linalg.inv(sum(precisions))
    gradient = total @ sum(p @ mean for p, mean in zip(precisions, means, strict=True))
    return gradient, np.stack([np.diag(total @ p) for p in precisions])


# --- a model whose representation is a free parameter --------------------------------------------


class FreeRepresentation(nn.Module):
    """Returns rows of its parameter: ``h.grad`` is what arrives at the representation."""

    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.h = nn.Parameter(h)

    def forward(self, rows: Sequence[int] | slice) -> Tensor:
        """``h`` of the given data."""
        return self.h[rows]


class FreeModel(nn.Module):
    """Linear heads on a free representation."""

    def __init__(self, h: Tensor, outputs: dict[str, int], bias: bool = True) -> None:
        super().__init__()
        self.shared = FreeRepresentation(h)
        make = {"dtype": h.dtype, "device": h.device}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(h.shape[1], o, bias=bias, **make) for name, o in outputs.items()}
        )

    def forward(self, rows: Sequence[int] | slice = slice(None)) -> dict[str, Tensor]:
        """Outputs of all heads for the given data."""
        h = self.shared(rows)
        return {name: head(h) for name, head in self.heads.items()}


def numpy(tensor: Tensor) -> Array:
    """A tensor as float64 on the CPU."""
    array: Array = tensor.detach().double().cpu().numpy()
    return array


def augmented(features: Tensor, bias: bool = True) -> Array:
    """``h̃`` as an array."""
    h = numpy(features)
    return np.concatenate([h, np.ones((len(h), 1))], axis=1) if bias else h


def head_weights(head: Any) -> Tensor:
    """Weights of a head with the bias, if it has one, as last column, ``[o, D]``."""
    parts = [head.linear.weight.detach().flatten(1)]
    if head.linear.bias is not None:
        parts.append(head.linear.bias.detach()[:, None])
    return torch.cat(parts, 1)


def concentrate(engine: Any, precision: float = 1e12) -> None:
    """Leave pre-training with full-data posteriors ``N(ŵ, I/precision)``: ``S → 0``, ``m → ŵ``.

    As if an enormous data set had confirmed the current weights of every head.
    """
    state = engine.get_extra_state()
    for group in state["memory"]["groups"]:
        heads = [engine.heads[name] for name in group["tasks"]]
        weights = torch.cat([head_weights(head) for head in heads]).double()
        tasks = sum(head.num_tasks for head in heads)
        if heads[0].kind == "multiclass":
            classes = weights.unflatten(0, (tasks, -1))
            weights = (contrast_basis(classes.shape[1], weights) @ classes).flatten(1)
        eye = torch.eye(weights.shape[1]).to(weights).repeat(len(weights), 1, 1)
        group["full"] = {
            "precision": precision * eye,
            "shift": precision * weights,
            "count": torch.ones(len(weights)).to(weights),
        }
    state["memory"]["epoch"] = engine.rule.pretrain_epochs
    engine.set_extra_state(state)

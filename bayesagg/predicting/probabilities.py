"""Expected probabilities of logits that are normally distributed, and their variance."""

from __future__ import annotations

import torch
from torch import Tensor

from bayesagg.moments.nodes import (
    gaussian_nodes,
    panel_nodes,
    sobol_nodes,
    standard_normal_nodes,
)

__all__ = ["class_probabilities", "sigmoid_moments"]

_HERMITE = {1: 48, 2: 20}  # nodes a dimension, by the number of dimensions
_SOBOL, _WHITENED = 512, 128


def sigmoid_moments(mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``p = σ(z)``, ``z ~ N(mean, sd²)``: ``E[p]``, ``E[1 - p]`` and ``Var[p]``.

    Neither of the first two loses digits near 0.
    """
    sd = sd.clamp_min(1e-6 if sd.dtype == torch.float64 else 1e-4)
    # Where a graph is traced, the one rule that serves all spreads.
    nodes = panel_nodes if torch.compiler.is_compiling() else gaussian_nodes
    x, w = nodes(mean.detach(), sd.detach())
    z = torch.addcmul(mean[..., None], sd[..., None], x)
    p = z.sigmoid()
    first, other = (p * w).sum(-1), ((-z).sigmoid() * w).sum(-1)
    total = first + other  # 1 but for the error of the quadrature
    first, other = first / total, other / total
    return first, other, ((p - first[..., None]).square() * w).sum(-1)


def class_probabilities(mean: Tensor, factor: Tensor, even: bool = False) -> tuple[Tensor, Tensor]:
    """Logarithms of the probabilities of all classes at the nodes of a cubature, ``[N, C, J]``.

    And the weights of the nodes, ``[J]``: Hermite nodes of one or two dimensions, otherwise (or
    where all must be ``even``, for quantiles) 512 symmetric Sobol points. Logits have a mean,
    ``[N, C]``, and the covariance ``F Fᵀ``, with the factor ``F``, ``[N, C, P]``.
    """
    dimensions, kind = factor.shape[2], (mean.dtype, mean.device)
    if dimensions in _HERMITE and not even:
        nodes, weights = standard_normal_nodes(dimensions, _HERMITE[dimensions], False, *kind)
    elif dimensions <= _WHITENED:
        nodes, weights = standard_normal_nodes(dimensions, _SOBOL, True, *kind)
    else:
        nodes = sobol_nodes(dimensions, _SOBOL, *kind)
        weights = nodes.new_full((_SOBOL,), 1 / _SOBOL)
    return (mean[..., None] + factor @ nodes).log_softmax(1), weights.view(-1)

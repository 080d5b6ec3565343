"""The aggregation by itself, from features and labels of a batch to the gradient at h.

Both arms get the same batch, labels, head weights and full-data prior. The library's arm calls
what its engine calls in a step; the literal arm is the paper's formulas as printed
(:mod:`examples.benchmark.literal`). The literal arm is spared what a step would not repeat: the
inverse of the prior covariance is taken beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesagg.combine import combine
from bayesagg.likelihoods import BLOCKS, Block, Labels
from bayesagg.posterior import augment, contrast_basis
from examples.benchmark import literal
from examples.benchmark.models import random_target
from examples.benchmark.shapes import Shape, Task
from examples.benchmark.steps import make_head

PRIOR_EXAMPLES = 4096
"""Size of the made-up training set behind the full-data prior; it costs neither arm anything."""


@dataclass(frozen=True)
class Group:
    """All outputs of one kind, as either arm takes them.

    Attributes:
        task: kind, exponent and prior variance that they share.
        block: the library's posterior, with one epoch behind it.
        labels: of the batch, for the library.
        y: the same labels (B, K), or (B,) class indices, for the literal formulas.
        weight: head weights ŵ with the bias last, (K, D).
        prior_mean: (K, D) for regression, (K·D,) for the joint posterior of classification.
        prior_inv: inverse of the prior covariance, (D, D) or (K·D, K·D).
    """

    task: Task
    block: Block
    labels: Labels
    y: Tensor
    weight: Tensor
    prior_mean: Tensor
    prior_inv: Tensor


@dataclass(frozen=True)
class Problem:
    """One batch for both arms: features (B, d) in float32 and a group for every task."""

    h: Tensor
    groups: tuple[Group, ...]
    dtype: torch.dtype


@torch.no_grad()
def make_problem(shape: Shape, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> Problem:
    """A batch of B = ``shape.batch`` after one epoch of ``PRIOR_EXAMPLES`` data.

    Args:
        shape: batch, dimension and tasks.
        dtype: of the library's posterior algebra; features and the literal arm are float32.
        seed: of weights and data.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        past = nn.functional.elu(torch.randn(PRIOR_EXAMPLES, shape.dim))
        h = nn.functional.elu(torch.randn(shape.batch, shape.dim))
        groups = tuple(_group(task, past, h, dtype) for task in shape.tasks)
    return Problem(h, groups, dtype)


def _group(task: Task, past: Tensor, h: Tensor, dtype: torch.dtype) -> Group:
    module = nn.Linear(h.shape[1], task.outputs)
    block = BLOCKS[task.kind]([task.name], [make_head(task, module)], dtype)
    labels, _ = _labels(task, module, past, dtype)
    block.commit(block.statistics(augment(past.to(dtype), True), labels))
    block.end_epoch()
    labels, y = _labels(task, module, h, dtype)
    weight = torch.cat([module.weight, module.bias[:, None]], dim=1)
    return Group(task, block, labels, y, weight, *_dense_prior(task, block))


def _labels(task: Task, module: nn.Linear, h: Tensor, dtype: torch.dtype) -> tuple[Labels, Tensor]:
    """Random labels; the loss has factor one, as the formulas of the paper have it."""
    y = random_target(task, len(h))
    outputs, targets = module(h).to(dtype), y.to(dtype)
    if task.kind == "multiclass":
        outputs, targets = outputs[:, None], nn.functional.one_hot(y, task.outputs)[:, None]
    return Labels(outputs, targets.to(dtype), outputs.new_ones(1, outputs.shape[1]), None), y


def _dense_prior(task: Task, block: Block) -> tuple[Tensor, Tensor]:
    """The evidence of the past epoch as mean and inverse covariance of the printed formulas."""
    assert block.full is not None
    precision, shift = block.full.precision.double(), block.full.shift.double()
    if task.kind == "binary":
        precision = torch.block_diag(*precision)
    elif task.kind == "multiclass":  # from contrasts of classes back to classes
        lift = contrast_basis(task.outputs, precision).mT.contiguous()
        lift = torch.kron(lift, torch.eye(block.width, dtype=lift.dtype))
        precision, shift = lift @ precision[0] @ lift.mT, shift @ lift.mT
    else:
        precision = precision[0]
    inverse = precision + torch.eye(len(precision), dtype=torch.float64) / task.prior_variance
    columns = shift.T if task.kind == "regression" else shift.reshape(-1, 1)
    mean = torch.linalg.solve(inverse, columns).T
    if task.kind != "regression":
        mean = mean[0]
    return mean.float(), inverse.float()


@torch.no_grad()
def run_library(problem: Problem) -> Tensor:
    """Eq. 7 as printed by the library: the update direction (B, d)."""
    features = {True: augment(problem.h.to(problem.dtype), True)}
    posteriors = []
    for group in problem.groups:
        evidence = group.block.statistics(features[True], group.labels)
        posteriors.append(group.block.posterior(evidence))
    gradient, _ = combine(
        [group.block for group in problem.groups],
        features,
        [group.labels for group in problem.groups],
        posteriors,
        scale="mean",
        full=False,
        generator=torch.Generator(),
        dtype=problem.h.dtype,
    )
    return gradient


@torch.no_grad()
def run_literal(problem: Problem, samples: int, *, dense: bool = True) -> Tensor:
    """The same by the formulas as printed, with J = ``samples``.

    Args:
        problem: the batch.
        samples: J of Eq. 11.
        dense: form E[g gᵀ] as printed; otherwise only its diagonal, all that Eq. 7 needs.
    """
    moments = [_literal_moments(problem.h, group, samples, dense) for group in problem.groups]
    return literal.aggregate(moments, [group.task.s for group in problem.groups])


def _literal_moments(h: Tensor, group: Group, samples: int, dense: bool) -> literal.Moments:
    y, prior = group.y, (group.prior_mean, group.prior_inv)
    if group.task.kind == "regression":
        return literal.regression_moments(h, y, literal.regression_posterior(h, y, *prior))
    if group.task.kind == "binary":
        posterior = literal.binary_posterior(h, y, group.weight, *prior)
        return literal.binary_moments(h, y, posterior, samples, dense=dense)
    posterior = literal.multiclass_posterior(h, y, group.weight, *prior)
    return literal.multiclass_moments(h, y, posterior, samples, dense=dense)

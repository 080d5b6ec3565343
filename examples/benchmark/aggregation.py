"""The aggregation by itself, from features and labels of a batch to the gradient at h.

Both arms get the same batch, labels, head weights and full-data prior. The library's arm is what
its rule for the paper calls in a step; the literal arm is the paper's formulas as printed
(:mod:`examples.benchmark.literal`), spared what a step would not repeat: the inverse of the prior
covariance is taken beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg.aggregation import aggregate_relative
from bayesagg.likelihoods import LIKELIHOODS, Evidence, Given, Likelihood
from bayesagg.moments import LogMoments
from bayesagg.posterior import augment, contrast_basis, from_natural
from bayesagg.reading import Labels
from examples.benchmark import literal
from examples.benchmark.cases import Case, Task
from examples.benchmark.networks import random_target
from examples.methods import HEADS

PRIOR_EXAMPLES = 4096
"""Size of the made-up training set behind the full-data prior; it costs neither arm anything."""


@dataclass(frozen=True)
class Group:
    """All outputs of one kind: one head."""

    likelihood: Likelihood  # the library's
    labels: Labels  # of the batch, for the library
    prior: Evidence  # natural parameters of one epoch of data and a unit Gaussian, for the library
    y: Tensor  # labels (B, K) or one-hot classes (B, C), for the literal formulas
    weight: Tensor  # head weights ŵ with the bias last, (K, D)
    # Inverse covariance and mean of the prior, joint over all outputs of classification
    dense: tuple[Tensor, Tensor]
    s: float  # exponent


@dataclass(frozen=True)
class Problem:
    """One batch for both arms: features (B, d) in float32, and the dtype of the library's arm."""

    h: Tensor
    groups: tuple[Group, ...]
    dtype: torch.dtype = torch.float64


@torch.no_grad()
def make_problem(case: Case, *, seed: int = 0) -> Problem:
    """A batch of B = ``case.batch`` after one epoch of ``PRIOR_EXAMPLES`` data."""
    outputs: dict[str, int] = {}
    for task in case.tasks:
        outputs[task.kind] = outputs.get(task.kind, 0) + task.outputs
    tasks = [Task(kind, kind, count) for kind, count in outputs.items()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        past = F.elu(torch.randn(PRIOR_EXAMPLES, case.dim))
        h = F.elu(torch.randn(case.batch, case.dim))
        return Problem(h, tuple(_group(task, past, h) for task in tasks))


def _group(task: Task, past: Tensor, h: Tensor) -> Group:
    module = nn.Linear(h.shape[1], task.outputs)
    likelihood = LIKELIHOODS[task.kind].of(task.name, HEADS[task.kind](module), None)
    labels, _ = _labels(task, module, past)
    seen = likelihood.evidence(augment(past.double(), True), labels, None)
    eye = torch.eye(likelihood.parameters, dtype=torch.float64)
    labels, y = _labels(task, module, h)
    weight = torch.cat([module.weight, module.bias[:, None]], dim=1)
    prior = replace(seen, precision=seen.precision + eye)
    s = likelihood.defaults["s"]
    return Group(likelihood, labels, prior, y, weight, _dense(task, seen, likelihood.width), s)


def _labels(task: Task, module: nn.Linear, h: Tensor) -> tuple[Labels, Tensor]:
    """Random labels; the loss has factor one, as the formulas of the paper have it."""
    y, outputs = random_target(task, len(h)), module(h).double()
    if task.kind == "multiclass":
        y, outputs = F.one_hot(y, task.outputs).float(), outputs[:, None]
    targets = y.double().view_as(outputs)
    return Labels(outputs, targets, outputs.new_ones(1, outputs.shape[1]), None), y


def _dense(task: Task, seen: Evidence, width: int) -> tuple[Tensor, Tensor]:
    """The evidence of the past epoch and a unit Gaussian, as the printed formulas take them."""
    precision, shift = torch.block_diag(*seen.precision), seen.shift
    if task.kind == "multiclass":  # from contrasts of classes back to classes
        lift = contrast_basis(task.outputs, precision).mT.contiguous()
        lift = torch.kron(lift, torch.eye(width, dtype=lift.dtype))
        precision, shift = lift @ precision @ lift.mT, shift @ lift.mT
    inverse = precision + torch.eye(len(precision), dtype=precision.dtype)
    columns = shift.T if task.kind == "regression" else shift.reshape(-1, 1)
    mean = torch.linalg.solve(inverse, columns).T
    return inverse.float(), (mean if task.kind == "regression" else mean[0]).float()


@torch.no_grad()
def run_library(problem: Problem) -> Tensor:
    """Eq. 7 as printed by the library: the update direction (B, d)."""
    h, generator = augment(problem.h.to(problem.dtype), True), torch.Generator()
    moments: list[LogMoments] = []
    for group in problem.groups:
        labels = group.labels.to(problem.dtype)
        new, prior = group.likelihood.evidence(h, labels, None), group.prior
        posterior = from_natural(
            new.precision + prior.precision.to(problem.dtype),
            new.shift + prior.shift.to(problem.dtype),
        )
        given = Given(h, labels.targets, posterior, generator)
        moments.append(group.likelihood.moments(given, problem.h.dtype))
    mean, relative, log_scale = (torch.cat(parts, 1) for parts in zip(*moments, strict=True))
    s = [g.s for g, m in zip(problem.groups, moments, strict=True) for _ in range(m.mean.shape[1])]
    return aggregate_relative(mean, relative, log_scale, mean.new_tensor(s), None, "mean")[0]


@torch.no_grad()
def run_literal(problem: Problem, samples: int) -> Tensor:
    """The same by the formulas as printed, with J = ``samples``."""
    h, moments = problem.h, []
    for group in problem.groups:
        y, softmax = group.y, group.labels.outputs.dim() == 3
        if group.dense[1].dim() == 2:
            posterior = literal.regression_posterior(h, y, *group.dense)
            moments.append(literal.regression_moments(h, y, posterior))
        else:
            posterior = literal.classification_posterior(h, y, group.weight, *group.dense, softmax)
            moments.append(literal.classification_moments(h, y, posterior, samples, softmax))
    return literal.aggregate(moments, [group.s for group in problem.groups])

"""Changes to a benchmark of regressions, for the regimes: number of tasks, scale, noise, gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from examples.comparison.benchmark import Benchmark
from examples.comparison.networks import mlp
from examples.comparison.tasks import Task
from examples.data import Split

WIDTHS = (128, 64)  # of the MLP: small, as there are many runs
_SEED = 7  # of mixtures, noise and gaps: the same for all methods and seeds


def changed(data: Benchmark, change: Mapping[str, float]) -> Benchmark:
    """Change the labels of a benchmark of regressions, for an MLP; metrics are in their units.

    Args:
        data: Its targets are standardised.
        change: Of ``tasks``: their number, the first of the benchmark, then random mixtures of two
            of them with standard normal weights. ``scale``: what the labels of every second task
            are multiplied by. ``noise``: standard deviation of what is added to the labels for
            training and validation, the label's own being one. ``missing``: share of the training
            labels that are taken away.
    """
    generator = torch.Generator().manual_seed(_SEED)
    count = int(change.get("tasks", len(data.tasks)))
    parts = [data.train, data.val, data.test]
    targets = _mixed([part.y for part in parts], count, generator)
    if noise := change.get("noise", 0.0):
        drawn = [noise * torch.randn(y.shape, generator=generator) for y in targets[:2]]
        targets[:2] = [y + e for y, e in zip(targets, drawn, strict=False)]
    scale = torch.ones(count)
    scale[1::2] = change.get("scale", 1.0)
    targets = [y * scale for y in targets]
    gaps = torch.rand(targets[0].shape, generator=generator) < change.get("missing", 0.0)
    targets[0][gaps] = torch.nan
    tasks = [replace(task, unit="σ") for task in data.tasks[:count]]
    tasks += [Task(f"mixture {k}", "regression", "mae", "σ") for k in range(len(tasks), count)]
    train, val, test = (Split(part.x, y) for part, y in zip(parts, targets, strict=True))
    return replace(
        data,
        tasks=tuple(tasks),
        train=train,
        val=val,
        test=test,
        scale=1 / scale,
        model=partial(mlp, int(data.version["inputs"]), WIDTHS, tasks),
        network=f"MLP {'-'.join(map(str, WIDTHS))}, ELU, linear heads",
        version={**data.version, "change": dict(change)},
    )


def _mixed(targets: list[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """The first targets, and mixtures of two, standardised on the training part."""
    given = targets[0].shape[1]
    if count <= given:
        return [y[:, :count].clone() for y in targets]
    weights = torch.zeros(given, count - given)
    for column in weights.T:
        column[torch.randperm(given, generator=generator)[:2]] = torch.randn(2, generator=generator)
    mixtures = [y @ weights for y in targets]
    mean, spread = mixtures[0].mean(0), mixtures[0].std(0)
    return [torch.cat([y, (m - mean) / spread], 1) for y, m in zip(targets, mixtures, strict=True)]

"""Small networks, batches and runs of the comparisons."""

import json

import torch

from examples import compare
from examples.comparison import runs
from examples.comparison.benchmark import table_benchmark
from examples.comparison.catalogue import methods, more_methods
from examples.comparison.gradients import GradientWeighting
from examples.comparison.networks import mlp
from examples.comparison.tasks import Task, criterion
from examples.training import TrainSettings

TASKS = (
    Task("r0", "regression", "mae"),
    Task("r1", "regression", "mae"),
    Task("b0", "binary", "auroc"),
    Task("c0", "multiclass", "accuracy", classes=3),
)
AT_ONCE = TrainSettings(warmup_steps=0)  # no warm-up
CATALOGUE = methods("utkface")
KNOWN = CATALOGUE | more_methods("utkface")
# Ensembles and torch-rechub's methods have networks of their own.
ALL = {n: m for n, m in KNOWN.items() if not n.startswith(("ensemble", "rechub"))}
GRADIENT = [n for n, m in CATALOGUE.items() if issubclass(m.update, GradientWeighting)]


def build(update, tasks=TASKS, **own):
    """The update on a small network, and a batch's losses by a function."""
    model = mlp(5, (6, 4), tasks)
    x, y = torch.randn(20, 5), targets(20, tasks)
    return update(model, AT_ONCE, 3, **own), lambda: criterion(tasks)(model(x), y)


def targets(count, tasks=TASKS):
    columns = {
        "regression": lambda: torch.randn(count),
        "binary": lambda: torch.randint(2, (count,)).float(),
        "multiclass": lambda: torch.randint(3, (count,)).float(),
    }
    return torch.stack([columns[task.kind]() for task in tasks], 1)


def made_up(tasks, parts):
    """A benchmark of 120 rows, of the first tasks of four."""
    x = torch.randn(120, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.stack([x[:, 0], x[:, 1] * 3, (x[:, 2] > 0) * 1.0, (x[:, 3] > 0) + (x[:, 4] > 1.0)], 1)
    return table_benchmark(
        tasks,
        x,
        y[:, : len(tasks)],
        torch.arange(120).split(parts),
        widths=(6, 4),
        version={},
        package="torch",
        max_train=None,
    )


def regressions(count):
    return tuple(Task(f"r{k}", "regression", "mae") for k in range(count))


def combination(update, rows):
    """Weights that the update gives gradients, and their combination."""
    weights = update._weigh(rows)
    return weights, weights @ rows


def scaled_rows(tasks, dimensions, spread=1.0):
    rows = torch.randn(tasks, dimensions, dtype=torch.float64)
    return rows * torch.logspace(0, spread, tasks, dtype=torch.float64)[:, None]


def run_of(benchmark, method, size=None, max_train=None, *, known=KNOWN, **settings):
    """A run of the comparison, which succeeds."""
    data = runs.Data(benchmark, size, max_train)
    job = runs.Job(data, method, known[method], TrainSettings(**settings), final=True)
    run = runs.run_job(job, lambda: None)
    assert not run.failure
    return run


def content(folder):
    """What a comparison has written."""
    return json.loads((folder / "results.json").read_text())


def compared(folder, *arguments):
    """Of a comparison that succeeds."""
    assert compare.main([*arguments, "--jobs", "1", "--output", str(folder)]) == 0
    return content(folder)

"""Small real tables with three targets each: ``python -m examples.comparison.small_tables``.

Those that :mod:`examples.data.r_tables` finds in R's packages, 40 to 150 rows: three regressions on
an MLP. Every method has every learning rate, and of each table the one with the lowest error on the
validation parts; then the test parts are looked at. The error is the geometric mean over targets
and splits of the MAE. Prints what it is over that of linear scalarization, over all tables.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import mean
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from bayesagg.errors import BayesAggError
from examples.arguments import Parser, add_jobs, whole
from examples.comparison.networks import mlp
from examples.comparison.regime_report import FEWEST, differences
from examples.comparison.report import markdown
from examples.comparison.statistics import logarithm
from examples.comparison.stress import METHODS
from examples.comparison.tasks import Task, criterion
from examples.data import DataUnavailableError, Split, split_indices
from examples.data.r_tables import TARGETS, read_tables
from examples.jobs import Tick, run_jobs
from examples.training import TrainSettings, train

DEFAULT = ("uw", "si", "si-readout", "bayesagg")
REFERENCE = "ls"
RATES = (3.2e-4, 1e-3, 3.2e-3, 1e-2)
TASKS = tuple(Task(f"target {k}", "regression", "mae") for k in range(TARGETS))
_WIDTHS, _EPOCHS, _BATCH = (64, 64, 32), 100, 16
_CLIP = 10.0  # standard deviations, of inputs


class Data(NamedTuple):
    """Parts of a table, standardised by the first."""

    train: Split
    val: Split
    test: Split


def split(x: Tensor, y: Tensor, seed: int) -> Data:
    """A table in three, 60/20/20."""
    rows = split_indices(len(x), val_fraction=0.2, test_fraction=0.2, seed=seed)
    own = x[rows[0]], y[rows[0]]
    x, y = (
        (values - part.mean(0)) / part.std(0).clamp_min(1e-6 * part.abs().max() + 1e-12)
        for values, part in zip((x, y), own, strict=True)
    )
    return Data(*(Split(x[some].clamp(-_CLIP, _CLIP), y[some]) for some in rows))


def run_job(job: tuple[tuple[Tensor, Tensor], str, float, int], tick: Tick) -> tuple[float, float]:
    """Mean logarithm of the MAE, on the validation part and the test part; infinite: it failed."""
    table, name, rate, seed = job
    data, method = split(*table, seed), METHODS[name]
    settings = TrainSettings(epochs=_EPOCHS, batch_size=_BATCH, learning_rate=rate, seed=seed)
    torch.manual_seed(seed)
    model = mlp(table[0].shape[1], _WIDTHS, TASKS)
    update = method.update(model, settings, settings.steps_per_epoch(data), **method.settings)
    found = []
    try:
        train(model, update, data, method.criterion(criterion(TASKS)), settings)
        with torch.no_grad():
            for part in (data.val, data.test):
                errors = (model(part.x)["regression"] - part.y).abs().mean(0)
                found.append(mean(map(logarithm, errors.tolist())))
    except (ArithmeticError, BayesAggError, torch.linalg.LinAlgError):
        found = [math.inf] * 2
    tick()
    val, test = (score if math.isfinite(score) else math.inf for score in found)
    return val, test


def chosen(scores: Mapping[tuple[float, int], tuple[float, float]], seeds: int) -> float:
    """Test score at the learning rate with the lowest one on the validation parts."""
    runs = {rate: [scores[rate, seed] for seed in range(seeds)] for rate in RATES}
    best = min(runs, key=lambda rate: mean(val for val, _ in runs[rate]))
    return mean(test for _, test in runs[best])


def report(table: pd.DataFrame) -> str:
    """Of scores by table and method, the reference's among them."""
    ratios = table.sub(table[METHODS[REFERENCE].label], axis=0).drop(
        columns=METHODS[REFERENCE].label
    )
    rows = [
        [
            name,
            f"{100 * math.expm1(own.mean()):+.1f}",
            f"{(own < 0).sum()} of {len(own)}",
            f"{100 * math.expm1(own.quantile(0.9)):+.0f}",
            f"{100 * math.expm1(own.max()):+.0f} ({own.idxmax()})",
        ]
        for name, own in ratios.items()
    ]
    header = ["error over that of LS [%]", "mean", "better on", "worst tenth from", "worst"]
    parts = [markdown(header, rows)]
    if len(table) >= FEWEST:
        parts.append(differences(table)[0].replace("regimes", "tables"))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on all tables; returns the exit status."""
    parser = Parser("comparison.small_tables", __doc__)
    own = {"choices": METHODS, "metavar": "NAME", "help": f"(default: {' '.join(DEFAULT)})"}
    parser.add_argument("--methods", nargs="+", default=[*DEFAULT], **own)
    text = "of every table (default: 1)"
    parser.add_argument("--splits", type=whole(1), default=1, metavar="N", help=text)
    add_jobs(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        tables = read_tables()
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = dict.fromkeys([REFERENCE, *options.methods])
    keys = list(product(tables, names, RATES, range(options.splits)))
    jobs = [(tables[table], *rest) for table, *rest in keys]
    with tqdm(total=len(jobs), unit="run") as bar:
        results = run_jobs(run_job, jobs, workers=options.jobs, on_tick=bar.update)
    scores: dict[tuple[str, str], dict[tuple[float, int], tuple[float, float]]] = {}
    for (table, name, rate, seed), result in zip(keys, results, strict=True):
        scores.setdefault((table, name), {})[rate, seed] = result
    found = {
        METHODS[name].label: [chosen(scores[table, name], options.splits) for table in tables]
        for name in names
    }
    print(report(pd.DataFrame(found, index=[*tables])))
    return 0


if __name__ == "__main__":
    sys.exit(main())

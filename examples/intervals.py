"""Intervals for molecules: ``python -m examples.intervals``.

Trains an MLP on 11 properties of QM9's molecules by BayesAgg, makes its predictor, and calibrates
it on the validation part. Prints for every property how many of the test molecules lie in their
50, 80, 90 and 95 % intervals, before and after, and draws one property with its intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bayesagg.diagnostics import interval_coverage
from bayesagg.plots import plot_coverage, plot_predictions
from examples.arguments import Parser
from examples.comparison.benchmark import trained
from examples.comparison.benchmarks import SOURCES
from examples.comparison.report import markdown
from examples.methods import BayesAggregation
from examples.uncertainty.arms import batches

LEVELS = (0.5, 0.8, 0.9, 0.95)
SHOWN = 120  # molecules in the picture


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = Parser("intervals", __doc__)
    parser.option("molecules", 10_000, "80/10/10 split")
    parser.option("epochs", 20, "passes over the training part")
    parser.option("property", "homo", "that is drawn")
    parser.option("out", Path("output/intervals.png"), "the figure")
    args = parser.parse_args(argv)
    source = SOURCES["qm9"]
    data = source.load(args.molecules, None)
    model, method = trained(data, replace(source.settings, epochs=args.epochs), BayesAggregation)
    names = [task.name for task in data.tasks]
    x, y = data.test.x, data.test.y
    predictor = method.optimizer.predictor(model, batches(data, model, "train"))
    p, levels = predictor(x)["regression"], torch.linspace(0.05, 0.95, 19).tolist()
    before, curves = interval_coverage(p, y, LEVELS), {"before": interval_coverage(p, y, levels)}
    predictor.calibrate(batches(data, model, "val"))
    p = predictor(x)["regression"]
    after, curves["calibrated"] = (interval_coverage(p, y, at) for at in (LEVELS, levels))
    shares = [torch.cat([share, share.mean(1, keepdim=True)], 1).T for share in (before, after)]
    rows = []
    for name, *pair in zip([*names, "mean"], *shares, strict=True):
        rows.append([name, *(f"{100 * a:.1f} → {100 * b:.1f}" for a, b in zip(*pair, strict=True))])
    print(markdown(["coverage in %", *(f"{100 * level:.0f}" for level in LEVELS)], rows))

    k = names.index(args.property)
    unit, low, high = data.scale[k], *(end[:SHOWN, k] for end in p.interval(0.9))
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = (part * unit for part in (y[:SHOWN, k], p.mean[:SHOWN, k], low, high))
    plot_predictions(*values, unit=f"{data.tasks[k].unit} from the mean", ax=left)
    left.set_title(f"{args.property}: {left.get_title()}")
    plot_coverage({name: curve.mean(1) for name, curve in curves.items()}, levels, ax=right)
    right.set_title("mean of 11 properties")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()

"""Methods at several learning rates, and paired t-tests of all pairs of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import matplotlib
from matplotlib.figure import Figure

from bayesagg.metrics import delta_m
from examples.comparison.benchmark import Benchmark
from examples.comparison.catalogue import SINGLE_TASK, Method
from examples.comparison.pipeline import Outcome
from examples.comparison.report import difference, markdown, p_value, spread
from examples.comparison.runs import criteria
from examples.comparison.statistics import holm, paired_interval, paired_p_value, task_means

_MOST_TASKS = 4  # with columns of their own
_MOST = 8  # methods of which all pairs are tested
_STYLES = ("o-", "s--", "D-.", "^:", "v-", "P--", "X-.", "*:")


def at_rates(methods: Mapping[str, Method], rates: Sequence[float]) -> dict[str, Method]:
    """Every method once per learning rate: ``ls@0.001``."""
    return {
        f"{name}@{rate:g}": replace(
            method,
            label=f"{method.label}, lr {rate:g}",
            training={**method.training, "learning_rate": rate},
        )
        for name, method in methods.items()
        for rate in rates
    }


def by_method(outcome: Outcome) -> dict[str, dict[float, str]]:
    """Names of what did not fail, by method and learning rate; the rate is 0 where there is one."""
    found: dict[str, dict[float, str]] = {}
    for name in outcome.standings:
        method, _, rate = name.partition("@")
        found.setdefault(method, {})[float(rate or 0)] = name
    return found


def best_rates(outcome: Outcome, data: Benchmark) -> dict[str, str]:
    """By method the name of its best learning rate, by Δm on the validation part."""
    single = task_means(criteria(data, outcome.runs[SINGLE_TASK], "val"))

    def validation(name: str) -> float:
        runs = criteria(data, outcome.runs[name], "val")
        return mean(delta_m(run, single, data.higher_is_better) for run in runs)

    return {method: min(n.values(), key=validation) for method, n in by_method(outcome).items()}


def errors(outcome: Outcome, name: str, data: Benchmark) -> list[float]:
    """100 % minus the metric, mean over the classification tasks, of every seed."""
    which = [k for k, task in enumerate(data.tasks) if task.higher_is_better]
    runs = criteria(data, outcome.runs[name], "shown")
    return [100 * (1 - mean(run[k] for k in which)) for run in runs]


def rate_tables(outcome: Outcome, labels: Mapping[str, str], data: Benchmark) -> list[str]:
    """Δm, and the error of classifications, of every method at every learning rate."""
    found = by_method(outcome)
    rates = sorted({rate for names in found.values() for rate in names})
    if rates in ([], [0]):
        return []
    best = best_rates(outcome, data)
    measures = {"Δm [%]": lambda name: outcome.standings[name].delta}
    if any(data.higher_is_better):
        measures["error [%]"] = lambda name: errors(outcome, name, data)
    tables = []
    for measure, values in measures.items():
        rows = [
            [
                _label(labels, names),
                *(spread(values(names[rate])) if rate in names else "" for rate in rates),
                f"{spread(values(best[method]))} ({best[method].partition('@')[2]})",
            ]
            for method, names in found.items()
        ]
        header = [f"{measure} at", *(f"{rate:g}" for rate in rates), "best by validation"]
        tables.append(markdown(header, rows))
    return tables


def pair_table(outcome: Outcome, labels: Mapping[str, str], data: Benchmark) -> str:
    """Paired difference of Δm and its t-test for every pair of methods, without correction.

    At every learning rate, and each at its best; empty with more than eight methods.
    """
    found = by_method(outcome)
    if not 2 <= len(found) <= _MOST:
        return ""
    groups = {}
    for rate in sorted({rate for names in found.values() for rate in names}):
        groups[f"{rate:g}" if rate else ""] = {m: n[rate] for m, n in found.items() if rate in n}
    if len(groups) > 1:
        groups["best of each"] = best_rates(outcome, data)
    rows = []
    for rate, names in groups.items():
        for a, b in combinations(names, 2):
            pair = f"{_label(labels, found[a])} - {_label(labels, found[b])}"
            p = paired_p_value(*(outcome.standings[names[m]].delta for m in (a, b)))
            rows.append([pair, rate, difference(outcome, names[a], names[b]), p_value(p)])
    return markdown(["pair", "learning rate", "difference of Δm", "p, paired t-test"], rows)


def best_table(outcome: Outcome, labels: Mapping[str, str], data: Benchmark, reference: str) -> str:
    """Metric of every task at each method's best learning rate by Δm on the validation part.

    Paired differences to the reference method, with half their 95 % interval, and p-values of
    paired t-tests with Holm's correction for the number of methods. Empty where there is one
    learning rate, or more tasks than columns for them.
    """
    found = by_method(outcome)
    if max(map(len, found.values()), default=0) < 2 or len(data.tasks) > _MOST_TASKS:
        return ""
    best = best_rates(outcome, data)
    order = sorted(best, key=lambda method: mean(outcome.standings[best[method]].delta))
    values = {m: criteria(data, outcome.runs[best[m]], "shown") for m in order}
    others = [m for m in order if m != reference and reference in best]
    header = ["each at its best", "learning rate"]
    rows = {m: [_label(labels, found[m]), best[m].partition("@")[2]] for m in order}
    against = _label(labels, found[reference]) if others else ""
    for k, task in enumerate(data.tasks):
        own = {m: [run[k] for run in values[m]] for m in order}
        header.append(task.title)
        for m in order:
            rows[m].append(spread(own[m], 4))
        if others:
            header += [f"difference to {against}", "p"]
            tests = holm([paired_p_value(own[m], own[reference]) for m in others])
            corrected = dict(zip(others, tests, strict=True))
            for m in order:
                pair = m in corrected and paired_interval(own[m], own[reference])
                rows[m] += ["{:+.4f} ± {:.4f}".format(*pair) if pair else ""]
                rows[m] += [p_value(corrected.get(m))]
    return markdown(header, list(rows.values()))


def _label(labels: Mapping[str, str], names: Mapping[float, str]) -> str:
    return labels[next(iter(names.values()))].partition(", lr ")[0]


def plot_rates(path: Path, outcome: Outcome, labels: Mapping[str, str], title: str) -> bool:
    """Draw Δm against the learning rate, a line per method; returns whether there are several."""
    found = by_method(outcome)
    if max((len(names) for names in found.values()), default=0) < 2:
        return False
    with matplotlib.rc_context({"font.size": 12}):
        figure = Figure(figsize=(6.5, 4.6), layout="constrained")
        axes = figure.subplots()
        means: list[float] = []
        for (_, names), style in zip(found.items(), _STYLES * len(found), strict=False):
            rates = sorted(names)
            deltas = [outcome.standings[names[rate]].delta for rate in rates]
            errors = [stdev(d) if len(d) > 1 else 0.0 for d in deltas]
            own = [mean(d) for d in deltas]
            axes.errorbar(rates, own, errors, fmt=style, label=_label(labels, names))
            means += own
        axes.set_xscale("log")
        every = sorted({rate for names in found.values() for rate in names})
        axes.set_xticks(every, [f"{rate:g}" for rate in every], minor=False)
        axes.set_xticks([], minor=True)
        if max(means) - min(means) > 60:  # linear scalarization is far off where scales differ
            axes.set_yscale("symlog", linthresh=20)
            low, high = axes.get_ylim()
            axes.set_yticks([t for t in (-50, -20, -10, 0, 10, 20, 50, 100, 200) if low < t < high])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("Δm [%], lower is better")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        axes.set_title(title)
        figure.savefig(path, dpi=150)
    return True

"""Tables and files of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pandas as pd

from examples.comparison.benchmark import Benchmark
from examples.comparison.catalogue import SINGLE_TASK
from examples.comparison.costs import Cost
from examples.comparison.pipeline import AGAINST, Chosen, Outcome, Plan
from examples.comparison.runs import Run, criteria, load
from examples.comparison.statistics import (
    logarithm,
    paired_interval,
    paired_p_value,
    relative_interval,
    task_means,
)

CALIBRATION = ("ece", "brier")
_ERRORS = (
    "Errors: geometric mean over the tasks, which asks for no yardstick, with its 95 % interval, "
    "and p of a paired t-test of the logarithms over the seeds, without a correction."
)
_PARTS = {"val": "validation", "test": "test"}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and, from two values on, sample standard deviation."""
    text = f"{round(mean(values), digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _order(outcome: Outcome) -> list[str]:
    """Methods by mean Δm, those that failed last."""
    done = sorted(outcome.standings, key=lambda name: mean(outcome.standings[name].delta))
    return done + [n for n in outcome.runs if n not in outcome.standings and n != SINGLE_TASK]


def own_settings(chosen: Chosen) -> str:
    """The settings that were chosen, in few words."""
    training = chosen.trial.training
    own = {"lr": f"{training.learning_rate:g}", "wd": f"{training.weight_decay:g}"}
    own |= {name.removeprefix("heads."): str(v) for name, v in chosen.trial.own.items()}
    return ", ".join(f"{name} {value}" for name, value in own.items())


def calibration(runs: Sequence[Run], name: str) -> float | None:
    """Mean over seeds and classification tasks; ``None`` where there is none."""
    found = [values[name] for run in runs for values in run.shown if name in values]
    return mean(found) if found else None


def summary_table(outcome: Outcome, labels: Mapping[str, str], reference: str) -> str:
    """A line per method, the best first.

    Δm, its difference to that of the reference method, rank, other measures, p-values, time of a
    step and settings.
    """
    extras = list(outcome.runs[SINGLE_TASK][0].extra)
    against = list(dict.fromkeys(n for s in outcome.standings.values() for n in s.p_values))
    measures = [name for name in CALIBRATION if calibration(outcome.runs[SINGLE_TASK], name)]
    header = ["method", "Δm [%]", f"difference to {labels.get(reference, reference)}", "mean rank"]
    header += [*extras, *map(str.upper, measures)]
    header += [f"p against {labels[name]}" for name in against] + ["ms per step", "settings"]
    rows = []
    for name in (*_order(outcome), SINGLE_TASK):
        runs, standing = outcome.runs[name], outcome.standings.get(name)
        if standing is None and name != SINGLE_TASK:
            failed = sum(bool(run.failure) for run in runs)
            line = [f"failed: {failed} of {len(runs)} seeds"]
            line += [""] * (len(header) - 4)
        else:
            line = [
                spread(standing.delta) if standing else "0",
                difference(outcome, name, reference),
                f"{standing.rank:.2f}" if standing else "",
                *(spread([run.extra[e] for run in runs], 4) for e in extras),
                *(f"{calibration(runs, m):.4f}" for m in measures),
                *(p_value(standing.p_values.get(o)) if standing else "" for o in against),
            ]
        step = f"{1e3 * median(run.seconds_per_step for run in runs):.4g}"
        rows.append([labels[name], *line, step, own_settings(outcome.chosen[name])])
    return markdown(header, rows)


def difference(outcome: Outcome, name: str, reference: str) -> str:
    """Of Δm to that of the reference method, paired, with half its 95 % interval."""
    if reference not in outcome.standings:  # at the same learning rate
        reference = f"{reference}@{name.partition('@')[2]}"
    if name == reference or not {name, reference} <= outcome.standings.keys():
        return ""
    pair = outcome.standings[name].delta, outcome.standings[reference].delta
    middle, half = paired_interval(*pair)
    return f"{middle:+.2f} ± {half:.2f}" if isfinite(half) else f"{middle:+.2f}"  # one seed


def p_value(p: float | None) -> str:
    """A p-value in few digits."""
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def task_table(outcome: Outcome, labels: Mapping[str, str], data: Benchmark) -> str:
    """A line per method, a column per task: the metric that Δm uses, mean over seeds."""
    rows = []
    for name in (SINGLE_TASK, *(n for n in _order(outcome) if n in outcome.standings)):
        values = task_means(criteria(data, outcome.runs[name], "shown"))
        rows.append([labels[name], *(f"{value:.4g}" for value in values)])
    return markdown(["metric", *(task.title for task in data.tasks)], rows)


def error_table(
    outcome: Outcome, labels: Mapping[str, str], data: Benchmark, reference: str
) -> str:
    """A line per method: its errors over the reference's, geometric mean over the tasks.

    Empty where a metric is no error, or the reference is at several learning rates.
    """
    if any(data.higher_is_better) or reference not in outcome.standings:
        return ""
    logs = {
        name: [mean(map(logarithm, run)) for run in criteria(data, outcome.runs[name], "shown")]
        for name in _order(outcome)
        if name in outcome.standings
    }
    rows = []
    for name, own in logs.items():
        if name != reference:
            middle, *ends = relative_interval(own, logs[reference])
            shown, p = f"{middle:+.1f}", ""
            if len(own) > 1:
                shown += " [{:+.1f}, {:+.1f}]".format(*ends)
                p = p_value(paired_p_value(own, logs[reference]))
            rows.append([labels[name], shown, p])
    return markdown([f"errors over those of {labels[reference]}", "[%]", "p"], rows)


def page(
    title: str,
    plan: Plan,
    outcome: Outcome,
    labels: Mapping[str, str],
    shared: Mapping[str, Any],
    costs: Mapping[str, Cost],
    more: Sequence[str] = (),
) -> str:
    """The tables as Markdown, with what they need to be read."""
    data = load(plan.data)
    if plan.trials > 1:
        search = f"Every method had {plan.trials} trials"
        if plan.untuned:
            kept = ", ".join(labels[name] for name in plan.untuned)
            search += f" ({kept}: none, default settings)"
        search += ", chosen by Δm on the validation part."
    else:
        search = "No method was tuned."
    best = min(outcome.standings, key=lambda name: mean(outcome.standings[name].delta), default="")
    tests = (
        "p: paired t-test of Δm over the seeds, two-sided, with Holm's correction for the number "
        "of methods compared with the same one."
    )
    if best and best not in AGAINST:
        tests += f" {labels[best]} was picked as the best by these very data."
    notes = [
        f"Δm: mean relative difference to the single-task models on the {_PARTS[plan.part]} part, "
        f"mean over {plan.seeds} seeds ± standard deviation; lower is better. Differences are "
        f"paired, ± half their 95 % interval. {search}",
        tests,
    ]
    settings = "\n".join(f"- {name}: {json.dumps(v)}" for name, v in shared.items())
    parts = [f"# {title}", summary_table(outcome, labels, plan.reference), *notes]
    parts += [*filter(None, more), task_table(outcome, labels, data)]
    if errors := error_table(outcome, labels, data, plan.reference):
        parts += [errors, _ERRORS]
    if costs:
        parts.append(cost_table(costs, labels))
    parts += [f"Settings:\n\n{settings}"]
    return "\n\n".join(parts) + "\n"


def cost_table(costs: Mapping[str, Cost], labels: Mapping[str, str]) -> str:
    """A line per method: time of a step, its ratio to linear scalarization, peak memory."""
    header = ["method", "ms per step", "ratio to LS", "peak of a step [MiB]"]
    rows = [
        [labels[n], f"{1e3 * c.seconds:.2f}", f"{c.ratio:.2f}", f"{c.peak_bytes / 2**20:.1f}"]
        for n, c in costs.items()
    ]
    return markdown(header, rows)


def write_csv(path: Path, outcome: Outcome, data: Benchmark, shared: Mapping[str, Any]) -> None:
    """Write a line per method, seed, task, part and metric, each with every setting."""
    common = {
        k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in shared.items()
    }
    rows = []
    for run in (run for runs in outcome.runs.values() for run in runs):
        training = run.identity["training"]
        tail = {key: training[key] for key in ("learning_rate", "weight_decay")}
        tail |= {"method_settings": json.dumps(run.identity["settings"]), "seconds": run.seconds}
        tail |= {"seconds_per_step": run.seconds_per_step, "failure": run.failure, "run": run.key}
        lines = [
            {"part": part, "task": task.name, "unit": task.unit, "metric": metric, "value": value}
            | {"used_for_delta_m": metric == task.metric}
            for part in ("val", "test")
            for task, values in zip(data.tasks, getattr(run, part), strict=False)
            for metric, value in values.items()
        ]
        head = {"method": run.method, "seed": run.seed}
        rows += [head | line | tail | common for line in lines or [{}]]
    pd.DataFrame(rows).to_csv(path, index=False)


def write_json(
    path: Path,
    outcome: Outcome,
    data: Benchmark,
    shared: Mapping[str, Any],
    costs: Mapping[str, Cost],
) -> None:
    """Write settings, the search, the statistics, the costs and every final run."""
    content = {
        "settings": dict(shared),
        "tasks": [asdict(task) for task in data.tasks],
        "search": {
            name: {
                "chosen": c.number,
                "settings": own_settings(c),
                "validation_delta_m": c.validation,
            }
            for name, c in outcome.chosen.items()
        },
        "summary": {name: asdict(standing) for name, standing in outcome.standings.items()},
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "runs": {name: [asdict(run) for run in runs] for name, runs in outcome.runs.items()},
    }
    text = json.dumps(_finite(content), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for (an infinite Δm of a failed trial) by null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return value

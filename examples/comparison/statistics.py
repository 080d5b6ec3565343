"""Statistics of a comparison: Δm, mean rank, paired tests with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

from bayesagg.metrics import delta_m, mean_rank

_SMALLEST = 1e-12  # an error of 0 has no logarithm
_LARGEST = 700.0  # logarithms beyond have no number: of runs that all but diverged


@dataclass(frozen=True)
class Standing:
    """A method over its seeds."""

    delta: list[float]  # Δm of each seed against the single-task mean over seeds, in percent
    rank: float  # mean rank among the multi-task methods, of the metrics averaged over seeds
    values: list[float]  # metric of each task, mean over seeds
    # By name of another method, the p-value of the paired t-test of Δm over seeds, corrected for
    # the number of comparisons with that method
    p_values: dict[str, float]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that keep the family-wise error rate."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def paired_p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided paired t-test; 1 where there is nothing to test with (one seed, no difference)."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < 2 or all(d == 0 for d in differences):
        return 1.0
    if max(differences) == min(differences):
        return 0.0
    return float(stats.ttest_rel(first, second).pvalue)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences ``first - second``, and half its 95 % interval (Student's t).

    The half is infinite for a single pair.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    if count < 2:
        return differences[0], math.inf
    half = float(stats.t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return mean(differences), half


def relative_interval(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float, float]:
    """Ratio of paired values less one with its 95 % interval, in percent, from their logarithms."""
    middle, half = paired_interval(first, second)
    low, middle, high = (
        100 * math.expm1(min(x, _LARGEST)) for x in (middle - half, middle, middle + half)
    )
    return middle, low, high


def logarithm(error: float) -> float:
    """Of an error; of none, that of a very small one."""
    return math.log(max(error, _SMALLEST))


def task_means(runs: Sequence[Sequence[float]]) -> list[float]:
    """Metric of each task, mean over runs."""
    return [mean(values) for values in zip(*runs, strict=True)]


def compare(
    values: Mapping[str, Sequence[Sequence[float]]],
    single_task: Sequence[Sequence[float]],
    higher_is_better: Sequence[bool],
    against: Sequence[str],
) -> dict[str, Standing]:
    """Compare methods by their metrics.

    Args:
        values: By method, for each seed the metric of each task; seeds in the same order.
        single_task: The same of the single-task models.
        higher_is_better: For each task whether a higher metric is better.
        against: Methods that all others are tested against. The one with the lowest mean Δm is
            added; that one is chosen by the data, so its p-values are a description.

    Returns:
        By method its standing.
    """
    reference = task_means(single_task)
    deltas = {
        name: [delta_m(run, reference, higher_is_better) for run in runs]
        for name, runs in values.items()
    }
    means = {name: task_means(runs) for name, runs in values.items()}
    ranks = mean_rank([means[name] for name in values], higher_is_better).tolist()
    best = min(deltas, key=lambda name: mean(deltas[name]))
    p_values: dict[str, dict[str, float]] = {name: {} for name in values}
    for other in dict.fromkeys((*against, best)):
        if other in values:
            names = [name for name in values if name != other]
            raw = [paired_p_value(deltas[name], deltas[other]) for name in names]
            for name, p in zip(names, holm(raw), strict=True):
                p_values[name][other] = p
    return {
        name: Standing(deltas[name], rank, means[name], p_values[name])
        for name, rank in zip(values, ranks, strict=True)
    }

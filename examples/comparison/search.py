"""Tuning: the same trials for every method, chosen by the validation part alone.

Where the best one has the lowest or the highest learning rate, the next beyond is tried too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import qmc

from bayesagg.metrics import delta_m
from examples.comparison.catalogue import Method
from examples.training import TrainSettings

_RATE_SPAN = 4.0  # learning rates between default / 4 and default * 4
FURTHEST = 4  # learning rates that are tried beyond the first ones
_DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
_DIMENSIONS = 6  # of the Halton sequence, one per setting
FIRST_SEARCH_SEED = 1000  # seeds of the search are not those of the comparison


@dataclass(frozen=True)
class Trial:
    """A method with settings to try."""

    method: Method  # the method, its own settings in place
    training: TrainSettings  # settings of the training
    own: dict[str, Any]  # the method's own settings that were chosen


def trial(method: Method, training: TrainSettings, number: int) -> Trial:
    """Settings of a trial; trial 0 is the default.

    The others are points of a Halton sequence: learning rate on a logarithmic scale, weight decay,
    and the method's own settings. Learning rate and weight decay of a trial are the same for all
    methods, and more trials leave the first ones as they are.
    """
    training = method.trained(training)
    if number == 0:
        return Trial(method, training, {})
    points = qmc.Halton(_DIMENSIONS, scramble=False).random(number + 1)[-1].tolist()
    rate = training.learning_rate * _RATE_SPAN ** (2 * points[0] - 1)
    rounded = float(f"{rate:.2g}")
    decay = _DECAYS[int(points[1] * len(_DECAYS))]
    own = {
        name: values[int(point * len(values))]
        for (name, values), point in zip(method.space.items(), points[2:], strict=False)
    }
    tuned = replace(training, learning_rate=rounded, weight_decay=decay)
    return Trial(method.with_settings(own), tuned, own)


def beyond(tried: Sequence[float], best: float, factor: float) -> float | None:
    """The learning rate to try next where the best one is the lowest or the highest; else none."""
    if min(tried) < best < max(tried):
        return None
    return float(f"{best * factor if best == max(tried) else best / factor:.2g}")


def widened(trials: Sequence[Trial], best: int) -> Trial | None:
    """The best trial with a learning rate beyond all others, where it has the edge of them."""
    chosen = trials[best]
    rates = [one.training.learning_rate for one in trials]
    rate = beyond(rates, chosen.training.learning_rate, _RATE_SPAN)
    if rate is None:
        return None
    return replace(chosen, training=replace(chosen.training, learning_rate=rate))


def choose(
    trials: Sequence[Sequence[list[float] | None]],
    reference: Sequence[float],
    higher_is_better: Sequence[bool],
) -> tuple[int, list[float]]:
    """The trial with the lowest Δm on the validation part, mean over the seeds of the search.

    Args:
        trials: Per trial and seed the metric of each task; ``None`` where the training failed.
        reference: Metric of each task of the single-task models.
        higher_is_better: For each task whether a higher metric is better.

    Returns:
        Number of the trial (the first of equals; 0 if all failed), and Δm of each, infinite where a
        training failed.
    """
    deltas = []
    for runs in trials:
        found = [delta_m(run, reference, higher_is_better) for run in runs if run is not None]
        deltas.append(sum(found) / len(found) if len(found) == len(runs) else math.inf)
    return min(range(len(deltas)), key=deltas.__getitem__), deltas

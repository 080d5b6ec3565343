"""Seconds and peak memory of a step of every method, side by side on the same batches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from examples.benchmark.measuring import Clock, interleave, median_ratio, trace
from examples.comparison.benchmark import Benchmark
from examples.comparison.catalogue import Method
from examples.training import TrainSettings

_ROUNDS = 15  # of two steps each
# Steps per epoch and before the rounds. An even epoch and an odd number of steps before the rounds,
# of two steps, keep the end of an epoch out of the second step of a round, which is timed.
_EPOCH = 4
_SETTLE = 3 * _EPOCH - 3


@dataclass(frozen=True)
class Cost:
    """What a step of a method costs."""

    seconds: float  # median time of forward pass, update and whatever follows the step
    # To that of linear scalarization: median over the rounds, in each of which every method takes a
    # step
    ratio: float
    # Largest amount of memory alive during a step, above what was alive before it: activations,
    # gradients, what the method keeps for the length of the step
    peak_bytes: int


def _stepper(
    method: Method, data: Benchmark, settings: TrainSettings, x: Any, y: torch.Tensor
) -> Callable[[], None]:
    """A method's step on a batch, after a short warm-up and a few of them."""
    torch.manual_seed(settings.seed)
    plan = replace(settings, warmup_steps=_EPOCH, epochs=_EPOCH)
    model, criterion = method.network(data.model).train(), method.criterion(data.criterion)
    update = method.update(model, plan, _EPOCH, **method.settings)

    def step() -> None:
        update.step(criterion(model(x), y))
        update.after_step(lambda: criterion(model(x), y))

    for _ in range(_SETTLE):
        step()
    return step


def measure_costs(
    methods: Mapping[str, Method],
    data: Benchmark,
    settings: TrainSettings,
    *,
    rounds: int = _ROUNDS,
    clock: Clock = "wall",
) -> dict[str, Cost]:
    """Measure every method, among them linear scalarization under the name ``ls``.

    What happens more rarely is left out: the end of an epoch, at which the library updates its
    prior, and the training of IGBv2's agent.

    Args:
        methods: Methods by name, ``ls`` among them.
        data: Benchmark.
        settings: Batch size and the rest.
        rounds: How often every method is timed.
        clock: What time is.
    """
    batch = data.train.batch(torch.arange(min(settings.batch_size, len(data.train))))
    steppers = {name: _stepper(method, data, settings, *batch) for name, method in methods.items()}
    bar = tqdm(range(rounds), desc="costs", unit="round")
    seconds = interleave(steppers, rounds=bar, warmup=0, before=1, clock=clock)
    return {
        name: Cost(median(times), median_ratio(times, seconds["ls"]), _peak(steppers[name]))
        for name, times in seconds.items()
    }


def _peak(step: Callable[[], None]) -> int:
    """Largest sum of what PyTorch allocated and did not release yet, over one step."""
    step()  # as in a round: the next does not end an epoch
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [int(e["args"]["Bytes"]) for e in trace(profiler) if e.get("name") == "[memory]"]
    return max(accumulate(changes, initial=0))

"""Seconds and peak memory of a step of every method, side by side on the same batches."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from examples.benchmark.memory import trace
from examples.benchmark.timing import CLOCKS, Clock
from examples.comparison.benchmark import Benchmark
from examples.comparison.catalogue import Method
from examples.methods import LinearScalarization
from examples.training import Losses, TrainSettings

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


class _Stepper:
    """A method in its steady state: after a short warm-up and a few steps."""

    def __init__(self, method: Method, data: Benchmark, settings: TrainSettings) -> None:
        torch.manual_seed(settings.seed)
        plan = replace(settings, warmup_steps=_EPOCH, epochs=_EPOCH)
        self._model = method.network(data.model)
        self._losses = method.criterion(data.criterion)
        self._update: LinearScalarization = method.update(
            self._model, plan, _EPOCH, **method.settings
        )
        self._model.train()

    def step(self, x: Any, y: torch.Tensor) -> None:
        def losses() -> Losses:
            return self._losses(self._model(x), y)

        self._update.step(losses())
        self._update.after_step(losses)


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
    now = CLOCKS[clock]
    batch = data.train.batch(torch.arange(min(settings.batch_size, len(data.train))))
    steppers = {name: _Stepper(method, data, settings) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with tqdm(total=(rounds + 1) * len(methods), desc="costs", unit="turn") as bar:
        for stepper in steppers.values():
            for _ in range(_SETTLE):
                stepper.step(*batch)
            bar.update()
        for _ in range(rounds):
            for name, stepper in steppers.items():
                stepper.step(*batch)  # the caches are the method's own
                start = now()
                stepper.step(*batch)
                seconds[name].append(now() - start)
                bar.update()
    return {
        name: Cost(
            median(times),
            median(t / ls for t, ls in zip(times, seconds["ls"], strict=True)),
            _peak(steppers[name], batch),
        )
        for name, times in seconds.items()
    }


def _peak(stepper: _Stepper, batch: tuple[Any, torch.Tensor]) -> int:
    """Largest sum of what PyTorch allocated and did not release yet, over one step."""
    stepper.step(*batch)  # as in a round: the next does not end an epoch
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        stepper.step(*batch)
    changes = [int(e["args"]["Bytes"]) for e in trace(profiler) if e.get("name") == "[memory]"]
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak

"""Interleaved timings: the arms take turns in one run, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Literal

import torch

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleave(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: Mapping[str, int] | int = 1,
    warmup: int = 1,
    clock: Clock = "wall",
) -> dict[str, list[float]]:
    """Seconds per call of every arm in every round.

    Args:
        arms: Name → function without arguments.
        rounds: How often every arm gets its turn. The order is reversed every other round, so
            that neither arm always runs on the caches the other one left.
        calls: Calls in one turn, of which the mean counts, or as many by name (else 1).
        warmup: Untimed calls of every arm before the first round.
        clock: ``"wall"``, or ``"cpu"`` for the processor time of this process, which other
            programs on the machine hardly touch; for one thread only, since threads that wait
            for each other are busy too.
    """
    turns = {name: calls if isinstance(calls, int) else calls.get(name, 1) for name in arms}
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            start = CLOCKS[clock]()
            for _ in range(turns[name]):
                arms[name]()
            if torch.cuda.is_initialized():  # steps are queued there
                torch.cuda.synchronize()
            seconds[name].append((CLOCKS[clock]() - start) / turns[name])
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of the ratio of two arms."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))


def quartiles(numerator: list[float], denominator: list[float]) -> tuple[float, float]:
    """Lower and upper quartile over the rounds of the ratio of two arms (nearest rank)."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    last = len(ratios) - 1
    return ratios[round(0.25 * last)], ratios[round(0.75 * last)]

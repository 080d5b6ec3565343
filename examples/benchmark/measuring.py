"""Operator calls and peak memory by PyTorch's own profiler, and interleaved timings.

The arms take turns in one run, so that a busy machine slows all alike.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_STEP = "benchmark: step"
_SYNCHRONISATION = "aten::_local_scalar_dense"


def counts(step: Callable[[], object]) -> tuple[int, int]:
    """Operator calls of a step, those inside of others included, and looks at the device."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = [event.name for event in profiler.events()]
    return sum(name.startswith("aten::") for name in names), names.count(_SYNCHRONISATION)


def peak_bytes(make: Callable[[], Callable[[], object]]) -> int:
    """Largest amount of memory alive in a step, on the CPU.

    The profiler records each allocation and release. It runs from before the network is built, so
    what is summed up is everything that is alive: parameters, Adam's state, the library's own
    buffers, activations.

    Args:
        make: builds all that a step needs and returns it.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make()
        with record_function(_STEP):
            step()
    events = trace(profiler)
    span = next(e for e in events if e.get("name") == _STEP and "dur" in e)
    start, end = float(span["ts"]), float(span["ts"]) + float(span["dur"])
    alive = peak = 0
    for event in events:
        if event.get("name") != "[memory]" or event["args"].get("Device Type", 0) != 0:
            continue
        if peak == 0 and float(event["ts"]) >= start:
            peak = alive
        if float(event["ts"]) > end:
            break
        alive += int(event["args"]["Bytes"])
        if float(event["ts"]) >= start:
            peak = max(peak, alive)
    return peak


def trace(profiler: Any) -> list[dict[str, Any]]:
    """The profiler's events in order of time; the exported trace is its public format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return sorted((e for e in events if "ts" in e), key=lambda e: float(e["ts"]))


def interleave(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: Iterable[int],
    calls: Mapping[str, int] | int = 1,
    warmup: int = 1,
    before: int = 0,
    clock: Clock = "wall",
) -> dict[str, list[float]]:
    """Seconds per call of every arm in every round.

    Args:
        arms: Name → function without arguments.
        rounds: Numbers from 0, or a bar around them: every arm gets its turn in each. The order is
            reversed every other round, so that neither arm always runs on the caches the other one
            left.
        calls: Calls in one turn, of which the mean counts, or as many by name (else 1).
        warmup: Untimed calls of every arm before the first round.
        before: Untimed calls at the start of every turn, so that the caches are the arm's own.
        clock: ``"wall"``, or ``"cpu"`` for the processor time of this process, which other
            programs on the machine hardly touch; for one thread only, since threads that wait
            for each other are busy too.
    """
    turns = {name: calls if isinstance(calls, int) else calls.get(name, 1) for name in arms}
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in rounds:
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            for _ in range(before):
                arms[name]()
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

"""Operator calls and peak memory of a training step, by PyTorch's own profiler."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

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

"""Peak memory of a training step, reconstructed from every allocation PyTorch makes on the CPU.

The profiler records each allocation and release. It runs from before the network is built, so
what is summed up is everything that is alive: parameters, Adam's state, the library's own
buffers, activations. ``peak_rss`` is a cross-check by what the operating system counts.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bayesagg import BayesAggWrapper
from examples.benchmark.shapes import Shape
from examples.benchmark.steps import Step, bayesagg_step, plain_step, pretrain

ARMS: dict[str, Callable[[Shape], Step]] = {
    "default": bayesagg_step,
    "paper": partial(bayesagg_step, rule="paper"),
    "plain": plain_step,
}
_STEP, _EPOCH_END = "benchmark: step", "benchmark: end of epoch"


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one arm; everything that is alive counts.

    Attributes:
        step_peak: Largest amount during one step after pre-training.
        step_growth: What the step left behind.
        epoch_end_peak: Largest amount while an epoch is folded into the full-data posterior;
            ``None`` for the plain arm.
    """

    step_peak: int
    step_growth: int
    epoch_end_peak: int | None


def measure(shape: Shape, arm: str) -> MemoryUse:
    """Memory of one steady-state step of ``arm``, one of ``ARMS``."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _run(shape, arm)
    events = trace(profiler)
    step = _window(events, _STEP)
    ends = _window(events, _EPOCH_END) if arm != "plain" else None
    return MemoryUse(max(step), step[-1] - step[0], max(ends) if ends else None)


def _run(shape: Shape, arm: str) -> None:
    """One epoch of pre-training, two steps to settle, the step that counts, the epoch's end."""
    step = ARMS[arm](shape)
    pretrain(step)
    for _ in range(2):
        step.run()
    with record_function(_STEP):
        step.run()
    if isinstance(step.optimizer, BayesAggWrapper):
        with record_function(_EPOCH_END):
            step.optimizer.end_epoch()


def trace(profiler: Any) -> list[dict[str, Any]]:
    """The profiler's events in order of time; the exported trace is its public format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return sorted((e for e in events if "ts" in e), key=lambda e: float(e["ts"]))


def _window(events: list[dict[str, Any]], name: str) -> list[int]:
    """Bytes alive at the start of the range ``name`` and after each allocation inside it."""
    span = next(e for e in events if e.get("name") == name and "dur" in e)
    start, end = float(span["ts"]), float(span["ts"]) + float(span["dur"])
    alive = 0
    inside: list[int] = []
    for event in events:
        if event.get("name") != "[memory]" or event["args"].get("Device Type", 0) != 0:
            continue
        if float(event["ts"]) > end:
            break
        if float(event["ts"]) >= start and not inside:
            inside.append(alive)
        alive += int(event["args"]["Bytes"])
        if inside:
            inside.append(alive)
    return inside or [alive]


def peak_rss(shape: Shape, arm: str, threads: int) -> int | None:
    """Peak resident memory in bytes of a fresh process that does the same; ``None`` off Linux."""
    if not Path("/proc/self/status").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_rss_here, (shape, arm, threads))


def _peak_rss_here(shape: Shape, arm: str, threads: int) -> int:
    torch.set_num_threads(threads)
    _run(shape, arm)
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

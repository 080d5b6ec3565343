"""Independent trainings side by side, one process each, with one progress count."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch

Tick = Callable[[], None]

_ticks: SimpleQueue[None] | None = None  # set in worker processes only


def run_jobs(
    function: Callable[[Any, Tick], Any],
    jobs: Sequence[Any],
    *,
    workers: int,
    on_tick: Tick,
    on_result: Callable[[Any], None] = lambda result: None,
) -> list[Any]:
    """Call ``function`` on every job, in this process or in several.

    Small networks gain nothing from several threads, so each worker computes with one; the jobs are
    started in the given order: put long ones first.

    Args:
        function: Takes a job and a function to call at each unit of progress. Defined at the top of
            a module, as jobs and results are pickled.
        jobs: What to do.
        workers: Number of processes; with 1 nothing is started.
        on_tick: Called in this process for each unit of progress.
        on_result: Called in this process with each result as soon as it is there.

    Returns:
        Results in the order of ``jobs``.
    """
    if workers == 1:
        results = []
        for job in jobs:
            results.append(function(job, on_tick))
            on_result(results[-1])
        return results
    context = multiprocessing.get_context("spawn")  # forking a process that has used torch can hang
    # A put has arrived when it returns: at a job's end all of its ticks can be read.
    ticks = context.SimpleQueue()
    with ProcessPoolExecutor(workers, context, _start_worker, (ticks,)) as pool:
        futures = [pool.submit(_work, function, job) for job in jobs]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not ticks.empty():
                ticks.get()
                on_tick()
            for future in done:
                if not future.exception():
                    on_result(future.result())
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
                break
        return [future.result() for future in futures]


def _start_worker(ticks: SimpleQueue[None]) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


def _work(function: Callable[[Any, Tick], Any], job: Any) -> Any:
    return function(job, lambda: _ticks.put(None))

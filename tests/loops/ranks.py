"""Two gloo processes that run functions of the tests side by side, and never hang a test."""

import datetime
import io
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import torch

WORLD = 2
_LIMIT = 120  # seconds until a job counts as hung, on a machine with other things to do too


class RankFailed(AssertionError):
    """A job raised, or did not come to an end."""


def _join(rank: int, file: str) -> int:
    """The process, which is a rank from now on."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=_LIMIT),
    )
    return os.getpid()


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    """By value: tensors are not shared between processes."""
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(function(*args, **kwargs), file)
    return file.getvalue()


class Ranks:
    """A pair of processes in one process group; started when first used, anew after a failure."""

    def __init__(self) -> None:
        self._pools: list[ProcessPoolExecutor] = []
        self._processes: list[int] = []

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, mp_context=spawn) for _ in range(WORLD)]
        self._folder = tempfile.TemporaryDirectory()  # for groups that come later, too
        store = f"{self._folder.name}/store"
        jobs = [pool.submit(_join, rank, store) for rank, pool in enumerate(self._pools)]
        self._processes = [job.result(_LIMIT) for job in jobs]

    def stop(self) -> None:
        """End both processes."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        if self._pools:
            self._folder.cleanup()
        self._pools, self._processes = [], []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``function(rank, ...)`` on both ranks; what they return."""
        if not self._pools:
            self._start()
        jobs = [p.submit(_call, function, i, *args, **kwargs) for i, p in enumerate(self._pools)]
        results, failures = [], []
        for rank, job in enumerate(jobs):
            try:
                answer = io.BytesIO(job.result(_LIMIT if not failures else 5))
                results.append(torch.load(answer, weights_only=False))
            except Exception as error:  # also of a process that hangs, or has died
                failures.append(f"rank {rank}: {error!r} {error.__cause__ or ''}")
        if failures:
            self.stop()
            raise RankFailed("\n".join(failures))
        return results

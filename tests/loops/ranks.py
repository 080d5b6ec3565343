"""Two gloo processes that run functions of the tests side by side, and never hang a test."""

import datetime
import io
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WORLD = 2
_LIMIT = 120  # seconds until a job counts as hung, on a machine with other things to do too


class RankFailed(AssertionError):
    """A job raised, or did not come to an end."""


def _dumps(value: Any) -> bytes:
    """By value: tensors are not shared between processes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _loads(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _work(rank: int, file: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=_LIMIT),
    )
    while True:
        function, args, kwargs = pipe.recv()
        try:
            torch.manual_seed(0)
            answer = (True, _dumps(function(rank, *args, **kwargs)))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


class Ranks:
    """A pair of processes in one process group; started when first used, anew after a failure."""

    def __init__(self) -> None:
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes = []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, f"{self._folder.name}/store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            for pipe in self._pipes:
                pipe.close()
            self._folder.cleanup()
        self._processes = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """``function(rank, ...)`` on both ranks; what they return."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(_LIMIT if not failures else 5):
                    raise EOFError
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "it hung, or died\n"
            if good:
                results.append(_loads(value))
            else:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.stop()
            raise RankFailed("\n".join(failures))
        return results


@contextmanager
def running_ranks() -> Iterator[Ranks]:
    """Ranks that are ended with the context."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.stop()

"""Jobs in processes of their own."""

import multiprocessing

import pytest
import torch

from examples.jobs import run_jobs


def _square(job, tick):
    tick()
    if job < 0:
        raise ValueError("negative")
    return job * job, torch.get_num_threads()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_jobs_in_processes_keep_their_order_and_report(monkeypatch):
    """Forked here: those of the examples are spawned, which imports everything anew."""
    real, asked, ticks = multiprocessing.get_context, [], []
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda name: asked.append(name) or real("fork")
    )
    torch.set_num_threads(2)
    try:
        results = run_jobs(_square, [3, 1, 2], workers=2, on_tick=lambda: ticks.append(1))
    finally:
        torch.set_num_threads(1)
    assert results == [(9, 1), (1, 1), (4, 1)]
    assert len(ticks) == 3 and asked == ["spawn"]


def test_an_error_in_a_job_reaches_the_caller():
    with pytest.raises(ValueError, match="negative"):
        run_jobs(_square, [-1], workers=1, on_tick=lambda: None)

"""Jobs in processes of their own, which import this file and little else."""

import pytest
import torch

from examples.jobs import run_jobs


def _square(job, tick):
    tick()
    if job < 0:
        raise ValueError("negative")
    return job * job, torch.get_num_threads()


def test_jobs_in_processes_keep_their_order_and_report():
    ticks = []
    results = run_jobs(_square, [3, 1, 2], workers=2, on_tick=lambda: ticks.append(1))
    assert results == [(9, 1), (1, 1), (4, 1)]
    assert len(ticks) == 3


def test_an_error_in_a_job_reaches_the_caller():
    with pytest.raises(ValueError, match="negative"):
        run_jobs(_square, [-1], workers=1, on_tick=lambda: None)

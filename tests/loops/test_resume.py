"""Killed in the middle of an epoch and resumed in a new process, training ends in the same bits."""

import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.states import assert_same, snapshot
from tests.loops.resumable import EPOCHS, EVERY, HALT, STEPS, Run

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    """SIGKILL: nothing is said and nothing is flushed. What goes on from there is stopped as well.

    Under the paper's rule, whose epochs are counted: processes know of neither, and what is loaded
    under both is in ``tests/test_optimizer_state.py``.
    """
    command = [sys.executable, "-m", "tests.loops.resumable", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "halted\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for last, stop in ((HALT - EVERY, 17), (16, EPOCHS * STEPS)):
        run = Run()
        run.load(torch.load(tmp_path / "last.pt", weights_only=True))
        assert run.step == last
        run.train(tmp_path, stop=stop)
    whole = Run()
    (tmp_path / "whole").mkdir()
    whole.train(tmp_path / "whole")
    assert_same(*(snapshot(one.net, one.optimizer) for one in (whole, run)))

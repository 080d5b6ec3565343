"""Killed in the middle of an epoch and resumed in a new process, training ends in the same bits."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.states import assert_same, difference, snapshot
from tests.loops.resumable import EPOCHS, EVERY, HALT, STEPS, Run

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_run_ends_in_the_same_bits(tmp_path):
    """SIGKILL: nothing is said and nothing is flushed. What goes on from there is stopped as well.

    Of one rule: what the other's checkpoints hold is tested below, and processes know of neither.
    """
    rule = "paper"  # whose epochs are counted
    command = [sys.executable, "-m", "tests.loops.resumable", rule, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "halted\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for last, stop in ((HALT - EVERY, 17), (16, EPOCHS * STEPS)):
        run = Run(rule)
        run.load(torch.load(tmp_path / "last.pt", weights_only=True))
        assert run.step == last
        run.train(tmp_path, stop=stop)
    whole = Run(rule)
    (tmp_path / "whole").mkdir()
    whole.train(tmp_path / "whole")
    assert_same(*(snapshot(one.net, one.optimizer) for one in (whole, run)))


def test_the_end_depends_on_all_that_is_saved(rule, tmp_path):
    """With one part of the checkpoint left as it is in a new run, the end is another."""
    whole = Run(rule)
    whole.train(tmp_path)
    (tmp_path / "last.pt").unlink()
    first = Run(rule)
    first.train(tmp_path, stop=12)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    for left_out in (None, *saved):
        second = Run(rule)
        new = second.state()
        second.load(copy.deepcopy({k: new[k] if k == left_out else v for k, v in saved.items()}))
        second.train(tmp_path)
        same = difference(*(snapshot(run.net, run.optimizer) for run in (whole, second))) is None
        assert same == (left_out is None), left_out

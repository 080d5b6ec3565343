"""Killed in the middle of an epoch and resumed in a new process, training ends in the same bits."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import (
    assert_same,
    difference,
    snapshot,
)
from tests.loops.resumable import Run

ROOT = Path(__file__).resolve().parents[2]


def start(rule, folder, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.loops.resumable", rule, str(folder), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(rule, folder, *args):
    with start(rule, folder, *args) as process:
        said = process.stdout.read()
    assert process.returncode == 0
    return said, torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(rule, tmp_path_factory):
    return end(rule, tmp_path_factory.mktemp("whole"))[1]


@pytest.mark.parametrize(
    ("args", "resumed_at"),
    [(["--halt-at", "13"], 12), (["--halt-while-saving"], 10)],
    ids=["in_an_epoch", "while_saving"],
)
def test_a_killed_run_ends_in_the_same_bits(args, resumed_at, uninterrupted, rule, tmp_path):
    """SIGKILL: nothing is said and nothing is flushed. Step 13 is the third of its epoch."""
    with start(rule, tmp_path, *args) as process:
        try:
            assert process.stdout.readline() == "halted\n"
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "end.pt").exists()
    said, found = end(rule, tmp_path)
    assert said == f"resumed at {resumed_at}\n"
    assert_same(uninterrupted, found)


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

"""Parts of the comparison: search, statistics, and the benchmarks on tables."""

import math

import pandas as pd
import pytest
import torch

from examples.comparison.benchmarks import SOURCES, tables
from examples.comparison.catalogue import Method
from examples.comparison.search import choose, trial
from examples.comparison.statistics import compare as compare_values
from examples.comparison.statistics import holm
from examples.training import TrainSettings


def test_trials_are_the_same_for_all_and_more_of_them_keep_the_first():
    base = TrainSettings()
    plain, own = Method("a", object), Method("b", object, {"c": 1}, {"c": (1, 2, 3)})
    assert trial(plain, base, 0).training == trial(own, base, 0).training == base
    assert trial(own, base, 0).method.settings == {"c": 1}
    tried = [(trial(plain, base, n), trial(own, base, n)) for n in range(1, 25)]
    assert all(a.training == b.training for a, b in tried)
    rates = [a.training.learning_rate for a, _ in tried]
    assert 2.5e-4 <= min(rates) < 4e-4 and 3e-3 < max(rates) <= 4e-3
    assert {b.method.settings["c"] for _, b in tried} == {1, 2, 3}
    assert {a.training.weight_decay for a, _ in tried} == {0, 1e-5, 1e-4, 1e-3}


def test_a_failed_trial_is_never_chosen():
    trials = [[None, [1.0]], [[2.0], [2.0]], [[1.5], [1.7]]]
    number, deltas = choose(trials, [1.0], [False])
    assert number == 2
    assert deltas == [math.inf, pytest.approx(100), pytest.approx(60)]
    assert choose(trials, [1.0], [True])[0] == 1


def test_the_best_method_is_tested_against():
    values = {"ls": [[1.0], [1.1]], "x": [[0.5], [0.7]], "y": [[2.0], [2.2]]}
    standings = compare_values(values, [[1.0], [1.0]], [False], ["ls"])
    assert standings["x"].delta == pytest.approx([-50, -30])
    assert [standings[name].rank for name in values] == [2, 1, 3]
    assert set(standings["y"].p_values) == {"ls", "x"}
    assert set(standings["x"].p_values) == {"ls"}
    # Holm's correction steps down.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "kinds", "size"),
    [
        ("qm9", {"regression": 11}, 200),
        ("mnist", {"binary": 10}, None),
        ("yeast", {"binary": 14}, None),
        ("nhefs", {"regression": 1, "binary": 2, "multiclass": 1}, None),
        ("nih", {"binary": 14}, 400),
    ],
)
def test_benchmarks(name, kinds, size, cache):
    data = SOURCES[name].load(size, 100)
    found = [task.kind for task in data.tasks]
    assert {kind: found.count(kind) for kind in found} == kinds
    assert len(data.train) == 100
    full = SOURCES[name].load(size, None)
    assert len(full.train) > 100 and len(full.val) == len(data.val)
    x, y = full.train.batch(torch.arange(len(full.train)))
    assert x.abs().max() <= 6 and x.mean(0).abs().max() < 0.5
    for k, task in enumerate(data.tasks):
        if task.kind == "regression":
            assert y[:, k].std().item() == pytest.approx(1, rel=1e-3)
        else:
            values = set(torch.cat([y, full.test.y])[:, k].tolist())
            assert values <= set(range(max(2, task.classes)))
    assert data.version != full.version


def test_nih_parts_share_no_patient(monkeypatch):
    table = pd.read_csv
    frames = []
    monkeypatch.setattr(pd, "read_csv", lambda path: frames.append(table(path)) or frames[-1])
    captured = {}
    monkeypatch.setattr(tables, "table_benchmark", lambda *a, **k: captured.update(parts=a[3]))
    tables.load_nih(400, None)
    people = [set(frames[0]["Patient ID"].iloc[part.numpy()]) for part in captured["parts"]]
    assert [len(p) for p in people] == [240, 80, 80]
    assert not (people[0] & people[1] or people[0] & people[2] or people[1] & people[2])

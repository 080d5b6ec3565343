"""Calibration: ECE and Brier score by their definitions, and the figure of both."""

import pytest
import torch
from matplotlib.figure import Figure

from examples.comparison import figure, runs
from examples.comparison.catalogue import SINGLE_TASK, SINGLE_TASK_METHOD
from examples.comparison.pipeline import Outcome
from examples.comparison.statistics import Standing
from examples.comparison.tasks import Task, measure

REGRESSION = Task("r", "regression", "mae")
BINARY = [Task(f"b{k}", "binary", "auroc") for k in range(6)]


def calibration_error(confidence, correct, bins=15):
    """Σ over bins of the share of the data times |mean confidence - accuracy| (Naeini, 2015)."""
    total = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & (confidence < (b + 1) / bins)
        if inside.any():
            gap = confidence[inside].mean() - correct[inside].mean()
            total += inside.double().mean() * gap.abs()
    return float(total)


def test_binary_calibration_is_that_of_the_probability_of_the_class():
    z = 2 * torch.randn(500, 1)
    y = (torch.rand(500, 1) < 0.5).float()
    [found] = measure([BINARY[0]], {"binary": z}, y, torch.ones(1))
    p, target = z.sigmoid()[:, 0].double(), y[:, 0].double()
    assert found["ece"] == pytest.approx(calibration_error(p, target), rel=1e-4)
    assert found["ece"] > 0.05
    assert found["brier"] == pytest.approx(float(((p - target) ** 2).mean()), rel=1e-5)


def test_multiclass_calibration_is_that_of_the_top_class():
    logits, y = 2 * torch.randn(500, 5), torch.randint(5, (500, 1)).float()
    task = Task("c", "multiclass", "accuracy", classes=5)
    [found] = measure([task], {"c": logits}, y, torch.ones(1))
    p = logits.double().softmax(1)
    top, guess = p.max(1)
    correct = (guess == y[:, 0]).double()
    assert found["ece"] == pytest.approx(calibration_error(top, correct), rel=1e-4)
    one_hot = torch.eye(5, dtype=torch.float64)[y[:, 0].long()]
    assert found["brier"] == pytest.approx(float((p - one_hot).square().sum(1).mean()), rel=1e-5)


def test_a_certain_prediction_is_no_error_and_the_perfect_one_has_none():
    z = torch.tensor([[200.0], [200.0], [-200.0], [200.0]])
    for y, ece in (([1, 1, 0, 1], 0), ([1, 1, 0, 0], 0.25)):
        [found] = measure([BINARY[0]], {"binary": z}, torch.tensor(y).float()[:, None], z[:1, 0])
        assert found["ece"] == pytest.approx(ece, abs=1e-6)
        assert found["brier"] == pytest.approx(ece, abs=1e-6)


def outcome(values, failed=()):
    """Runs of two seeds, by method with ECE and Brier score of each task; seed 1 doubles them."""
    found = {}
    for name, measures in values.items():
        found[name] = [
            runs.Run(
                *("", {"training": {"seed": seed}}, name, name.upper(), []),
                test=[] if name in failed else [{"mae": 1.0}, *_scaled(measures, seed + 1)],
                extra={},
                failure="diverged" if name in failed else "",
                seconds=1.0,
                seconds_per_step=1.0,
                weights=[],
            )
            for seed in (0, 1)
        ]
    standings = {n: Standing([0.0], 1, [], {}) for n in values if n not in (SINGLE_TASK, *failed)}
    return Outcome({}, found, standings)


def _scaled(measures, factor):
    return [{"ece": factor * ece, "brier": factor * brier} for ece, brier in measures]


def draw(monkeypatch, tmp_path, values, tasks, failed=()):
    """Axes of the figure that is written."""
    kept = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: kept.append(f) or real(f, *a, **k))
    labels = {name: name.upper() for name in values} | {SINGLE_TASK: SINGLE_TASK_METHOD.label}
    path = tmp_path / "figure.png"
    done = figure.plot_calibration(path, outcome(values, failed), labels, tasks, "title")
    assert done == path.exists()
    return kept[0].axes if kept else []


def points(axes):
    return {tuple(round(float(v[0]), 6) for v in line.get_data()) for line in axes.lines}


def test_a_panel_per_task_has_a_point_and_a_label_per_method(monkeypatch, tmp_path):
    values = {
        "stl": [(0.1, 0.2), (0.3, 0.4)],
        "ls": [(0.2, 0.22), (0.02, 0.6)],
        "bayesagg": [(0.12, 0.24), (0.34, 0.42)],
        "uw": [],
    }
    panels = draw(monkeypatch, tmp_path, values, [REGRESSION, *BINARY[:2]], failed=["uw"])
    assert [axes.get_title() for axes in panels] == ["b0", "b1"]
    assert points(panels[0]) == {(0.15, 0.3), (0.3, 0.33), (0.18, 0.36)}
    assert points(panels[1]) == {(0.45, 0.6), (0.03, 0.9), (0.51, 0.63)}
    [legend] = panels[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["STL", "LS", "BAYESAGG"]
    for axes in panels:  # a style is a method's in every panel
        found = [(line.get_color(), line.get_marker()) for line in axes.lines]
        assert found == [(line.get_color(), line.get_marker()) for line in panels[0].lines]
        assert len({colour for colour, _ in found}) == len({mark for _, mark in found}) == 3
    assert panels[0].get_xscale() == "linear" and panels[1].get_xscale() == "log"


def test_many_tasks_are_one_panel_of_means(monkeypatch, tmp_path):
    values = {"stl": [(0.1, 0.2)] * 6, "ls": [(k / 10, 0.2) for k in range(6)]}
    [axes] = draw(monkeypatch, tmp_path, values, [REGRESSION, *BINARY])
    assert axes.get_title() == "mean over 6 tasks"
    assert points(axes) == {(0.15, 0.3), (0.375, 0.3)}


def test_regression_alone_has_no_figure(monkeypatch, tmp_path):
    assert draw(monkeypatch, tmp_path, {"stl": [], "ls": []}, [REGRESSION]) == []

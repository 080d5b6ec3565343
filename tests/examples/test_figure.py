"""The figure of calibration: what its points are, and of which tasks there are panels."""

from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from examples.comparison import figure
from examples.comparison.tasks import Task

TASKS = [Task("r", "regression", "mae"), *(Task(f"b{k}", "binary", "auroc") for k in range(6))]
LABELS = {"stl": "STL", "ls": "LS", "uw": "UW"}


def runs(measures, seeds=(1, 2)):
    """Of two seeds, the second of which has twice the ECE and Brier score of every task."""
    found = []
    for seed in seeds:
        classified = [{"ece": seed * ece, "brier": seed * brier} for ece, brier in measures]
        found.append(SimpleNamespace(test=[{"mae": 1.0}, *classified]))
        found[-1].shown = found[-1].test
    return found


@pytest.mark.parametrize(
    ("single", "ls", "panels"),
    [
        (
            [(0.1, 0.2), (0.3, 0.4)],
            [(0.2, 0.22), (0.02, 0.6)],
            {"b0": [(0.15, 0.3), (0.3, 0.33)], "b1": [(0.45, 0.6), (0.03, 0.9)]},
        ),
        (
            [(0.1, 0.2)] * 6,
            [(k / 10, 0.2) for k in range(6)],
            {"mean over 6 tasks": [(0.15, 0.3), (0.375, 0.3)]},
        ),
        ([], [], {}),
    ],
    ids=["a panel per task", "many tasks", "no classification"],
)
def test_a_method_that_did_not_fail_is_a_point(single, ls, panels, monkeypatch, tmp_path):
    drawn, path = [], tmp_path / "figure.png"
    monkeypatch.setattr(Figure, "savefig", lambda own, *_, **__: drawn.extend(own.axes))
    outcome = SimpleNamespace(
        runs={"stl": runs(single), "ls": runs(ls), "uw": runs([])}, standings={"ls": None}
    )
    tasks = TASKS[: 1 + len(single)]
    assert figure.plot_calibration(path, outcome, LABELS, tasks, "title") == bool(panels)
    found = {
        axes.get_title(): [tuple(float(v[0]) for v in line.get_data()) for line in axes.lines]
        for axes in drawn
    }
    assert found.keys() == panels.keys()
    for title, points in panels.items():
        assert found[title] == [pytest.approx(point) for point in points]
    for axes in drawn:  # a style is a method's in every panel
        styles = [(line.get_color(), line.get_marker()) for line in axes.lines]
        assert styles == [(line.get_color(), line.get_marker()) for line in drawn[0].lines]
        [legend] = axes.figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["STL", "LS"]

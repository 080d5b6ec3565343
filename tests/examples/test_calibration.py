"""Calibration: ECE and Brier score by their definitions, and the figure of both."""

from matplotlib.figure import Figure

from examples.comparison import figure, runs
from examples.comparison.catalogue import SINGLE_TASK, SINGLE_TASK_METHOD
from examples.comparison.pipeline import Outcome
from examples.comparison.statistics import Standing
from examples.comparison.tasks import Task

REGRESSION = Task("r", "regression", "mae")
BINARY = [Task(f"b{k}", "binary", "auroc") for k in range(6)]


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

"""Pictures: what is drawn is what was given, under labels that say what it is."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.quiver import Quiver

from bayesagg.aggregation import aggregate_diagonal, aggregate_full
from bayesagg.plots import (
    plot_calibration,
    plot_certainty,
    plot_conflict,
    plot_coverage,
    plot_predictions,
    plot_reliability,
    plot_task_weights,
    plot_update,
    plot_weights,
)
from bayesagg.plots.style import COLOURS

matplotlib.use("Agg")
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def _figures():
    yield
    pyplot.close("all")


def drawn(ax):
    """Axes whose figure was rendered: no warning, no text outside of it."""
    figure = ax.figure
    figure.canvas.draw()
    inked, paper = figure.get_tightbbox(figure.canvas.get_renderer()), figure.bbox_inches
    assert paper.x0 <= inked.x0 and inked.x1 <= paper.x1
    assert paper.y0 <= inked.y0 and inked.y1 <= paper.y1
    assert ax.get_xlabel() and ax.get_ylabel()
    labels = [label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())]
    assert any("[" in label for label in labels), "a unit"
    return ax


def arrows(ax):
    """Tip of every arrow by its label."""
    quivers = [c for c in ax.collections if isinstance(c, Quiver)]
    assert all(to_hex(q.get_facecolor()[0]) in {"#000000", "#0072b2", "#d55e00"} for q in quivers)
    return {q.get_label(): (float(q.U[0]), float(q.V[0])) for q in quivers}


def legend(ax):
    """The texts of its legend, if it has one."""
    return ax.get_legend().get_texts() if ax.get_legend() else []


def named(ax):
    """What the legend names."""
    return {text.get_text().strip() for text in legend(ax)}


# --- the update ----------------------------------------------------------------------------------

MEAN = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
VARIANCE = torch.tensor([[1.0, 0.04], [0.04, 1.0]], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[[1.0, 0.1], [0.1, 0.04]], [[0.04, 0.0], [0.0, 1.0]]], dtype=torch.float64
)


@pytest.mark.parametrize("s", [1.0, 0.4])
@pytest.mark.parametrize("full", [False, True], ids=["Eq. 7", "Eq. 6"])
def test_update_draws_means_average_and_aggregate(full, s):
    second = COVARIANCE if full else VARIANCE
    ax = drawn(plot_update(MEAN, second, s=s, names=["a", "b"]))
    exponent = torch.full((2,), s, dtype=torch.float64)
    if full:
        expected = aggregate_full(MEAN[None], second[None], exponent, scale="mean")[0]
    else:
        expected = aggregate_diagonal(MEAN[None], second[None].log(), exponent, scale="mean")[0]
    tips = arrows(ax)
    assert tips["a"] == (1, 3) and tips["b"] == (3, 1) and tips["average"] == (2, 2)
    assert tips["aggregate"] == pytest.approx(expected[0].tolist())
    assert named(ax) == {"average", "aggregate"}


def test_update_draws_one_and_two_standard_deviations():
    ax = plot_update(MEAN, COVARIANCE)
    outlines = [line.get_xydata() for line in ax.lines]
    assert len(outlines) == 4
    for outline, task, radius in zip(outlines, [0, 0, 1, 1], [2, 1, 2, 1], strict=True):
        off = outline - MEAN[task].numpy()
        distance = np.einsum("nd,de,ne->n", off, np.linalg.inv(COVARIANCE[task]), off)
        assert np.allclose(distance, radius**2)
        low, high = outline.min(0), outline.max(0)
        assert (ax.get_xlim()[0] <= low[0]) and (high[0] <= ax.get_xlim()[1])
        assert (ax.get_ylim()[0] <= low[1]) and (high[1] <= ax.get_ylim()[1])


# --- weights -------------------------------------------------------------------------------------


def test_weights_are_drawn_stage_beside_stage():
    weights = torch.rand(5, 3, 4).softmax(1)
    later = torch.rand(2, 3).softmax(1)
    ax = drawn(plot_weights({"start": weights, "end": later}, names=["a", "b", "c"]))
    [image] = ax.images
    values = image.get_array()
    assert values.shape == (3, 8)
    assert np.allclose(values[:, :5], weights.mean(2).T)
    assert np.allclose(values[:, 6:], later.T)
    assert np.ma.getmaskarray(values)[:, 5].all() or np.isnan(values[:, 5]).all()
    assert image.get_clim()[0] == 0 and image.get_cmap().name == "cividis"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["start\n5 data", "end\n2 data"]
    assert list(ax.get_xticks()) == [2, 6.5]
    [bar] = [a for a in ax.figure.axes if a is not ax]
    assert bar.get_ylabel() == "mean weight [share]\nwhite line: uniform"
    assert np.allclose(bar.lines[-1].get_ydata(), 1 / 3)


def test_task_weights_draw_a_line_per_output():
    history = [
        {"age": torch.tensor([0.2]), "found": torch.tensor([0.5, 0.3])},
        {"age": torch.tensor([0.6]), "found": torch.tensor([0.3, 0.1])},
    ]
    ax = drawn(plot_task_weights(history, steps=[10, 20], unit="epoch"))
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"age", "found 0", "found 1", "uniform"}
    assert np.allclose(lines["age"].get_xydata(), [(10, 0.2), (20, 0.6)])
    assert np.allclose(lines["found 1"].get_xydata(), [(10, 0.3), (20, 0.1)])
    assert np.allclose(lines["uniform"].get_ydata(), 1 / 3)
    assert ax.get_xlabel() == "epoch of training" and ax.get_ylim()[0] == 0
    assert named(ax) == set(lines)


# --- conflict and certainty ----------------------------------------------------------------------


def test_conflict_is_in_percent():
    ax = drawn(plot_conflict([torch.tensor([0.25, 0.5]), torch.tensor([0.0, 1.0])], names="ab"))
    assert [list(line.get_ydata()) for line in ax.lines] == [[25, 0], [50, 100]]
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert ax.get_ylim() == (0, 100) and "%" in ax.get_ylabel()


def test_certainty_is_logarithmic_with_its_threshold():
    ax = drawn(plot_certainty(np.array([[0.1, 10.0], [1.0, 3.0], [2.0, 2.0]]), steps=[0, 5, 9]))
    assert ax.get_yscale() == "log"
    *lines, level = ax.lines
    assert np.allclose(lines[0].get_xydata(), [(0, 0.1), (5, 1), (9, 2)])
    assert [line.get_label() for line in lines] == ["task 0", "task 1"]
    assert np.allclose(level.get_ydata(), 1) and level.get_label() == "gradient = noise"


def test_many_tasks_are_told_apart():
    ax = drawn(plot_conflict(torch.rand(3, 28)))
    styles = {(to_hex(line.get_color()), line.get_linestyle()) for line in ax.lines}
    assert len(styles) == 28
    assert {colour for colour, _ in styles} == {colour.lower() for colour in COLOURS}


def test_in_a_dark_style_all_lines_can_be_seen():
    with pyplot.style.context("dark_background"):
        lines = plot_conflict(torch.rand(3, 28)).lines
        colours = {to_hex(line.get_color()) for line in lines}
        update = plot_update(MEAN, VARIANCE)
        colours |= {to_hex(arrow.get_facecolor()[0]) for arrow in update.collections}
    assert "#000000" not in colours and "#ffffff" in colours


def test_names_with_an_underscore_are_in_the_legend():
    """Matplotlib would leave them out."""
    history = [{"_age": torch.tensor([0.5]), "b_c": torch.tensor([0.5])}]
    for ax in (plot_task_weights(history), plot_coverage({"_age": [0.1], "b_c": [0.2]}, [0.1])):
        assert {"_age", "b_c"} <= named(ax)


# --- calibration ---------------------------------------------------------------------------------


def test_reliability_draws_accuracy_against_confidence():
    probabilities = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.4])
    targets = torch.tensor([1, 1, 1, 0, 0])  # the last: class 0 with confidence 0.6
    ax = drawn(plot_reliability(probabilities, targets, bins=5))
    [line] = [line for line in ax.lines if line.get_label() == "accuracy"]
    assert np.allclose(line.get_xydata(), [(0.6, 1), (0.95, 0.75)])
    assert np.allclose([bar.get_height() for bar in ax.patches], [0, 0, 0.2, 0, 0.8])
    assert np.allclose([bar.get_x() for bar in ax.patches], [0, 0.2, 0.4, 0.6, 0.8])
    assert ax.get_title() == "expected calibration error 0.240"  # 0.8 · 0.2 + 0.2 · 0.4


def test_calibration_draws_a_point_per_method():
    ax = drawn(plot_calibration({"LS": (0.1, 0.4), "ours": (0.05, 0.3)}, highlight="ours"))
    points = {line.get_label(): line for line in ax.lines}
    assert tuple(points["LS"].get_xydata()[0]) == (0.1, 0.4)
    assert tuple(points["ours"].get_xydata()[0]) == (0.05, 0.3)
    assert points["LS"].get_marker() != points["ours"].get_marker()
    assert {t.get_text() for t in ax.texts} == {"LS", "ours"}
    assert "Brier" in ax.get_ylabel() and "calibration" in ax.get_xlabel()


# --- all -----------------------------------------------------------------------------------------

CALLS = {
    "update": lambda ax: plot_update(MEAN, VARIANCE, ax=ax),
    "weights": lambda ax: plot_weights({"a": torch.rand(4, 2)}, ax=ax),
    "task_weights": lambda ax: plot_task_weights([{"a": torch.rand(2)}], ax=ax),
    "conflict": lambda ax: plot_conflict(torch.rand(2, 2), ax=ax),
    "certainty": lambda ax: plot_certainty(torch.rand(2, 2) + 1, ax=ax),
    "reliability": lambda ax: plot_reliability(torch.rand(9), torch.ones(9), ax=ax),
    "calibration": lambda ax: plot_calibration({"a": (0.1, 0.2)}, ax=ax),
}


@pytest.mark.parametrize("name", CALLS)
def test_draws_into_the_axes_given_in_legible_text(name):
    """At least 12 points in a figure no wider than 8 inches: 6 points at half its size."""
    _, given = pyplot.subplots()
    assert CALLS[name](given) is given
    assert given.has_data() or given.images
    assert len(pyplot.get_fignums()) == 1
    ax = CALLS[name](None)
    assert ax is not given and ax.figure.get_figwidth() <= 8
    texts = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()]
    texts += [*ax.texts, *legend(ax)]
    assert min(text.get_fontsize() for text in texts) >= 12


ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot_update(torch.ones(2, 3), torch.ones(2, 3)), "two of the shared dimensions"),
        (lambda: plot_update(ONES, torch.ones(3, 2)), "expected mean"),
        (lambda: plot_update(ONES, torch.tensor([[1.0, 0.0], [1.0, 1.0]])), "positive"),
        (lambda: plot_update(torch.tensor([[torch.nan, 1.0]]), ONES[:1]), "not finite"),
        (lambda: plot_weights({"a": torch.ones(2, 3), "b": torch.ones(2, 4)}), "differ"),
        (lambda: plot_weights({}), "no stage"),
        (lambda: plot_task_weights([]), "empty"),
        (lambda: plot_task_weights([{"a": ONES[0]}, {"b": ONES[0]}]), "different tasks"),
        (lambda: plot_conflict(torch.rand(2, 3), names=["a"]), "2 times and 3 tasks"),
        (lambda: plot_conflict(torch.rand(2, 3), steps=[1, 2, 3]), "2 times and 3 tasks"),
        (lambda: plot_calibration({}), "no scores"),
        (lambda: plot_predictions(np.ones(3), *[np.ones(4)] * 3), "3 targets"),
        (lambda: plot_coverage({"a": [0.1, 0.2]}, [0.5, 0.8, 0.9]), "'a': 2 shares for 3 levels"),
        (lambda: plot_coverage({}, [0.5, 0.8, 0.9]), "no coverage"),
        (lambda: plot_predictions(*[np.ones((3, 1))] * 4), r"pass one output, \[:, 0\]"),
        (lambda: plot_predictions(np.full(3, np.nan), *[np.ones(3)] * 3), "leave them out"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_missing_matplotlib_is_named(monkeypatch):
    """That the package can be imported without it: ``test_packaging.py``."""
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"bayesagg\[plots\]"):
        plot_conflict(torch.rand(2, 2))


# --- predictions ---------------------------------------------------------------------------------


def test_predictions_with_intervals():
    y = np.array([0.0, 1.0, 2.0, 3.0])
    ax = drawn(plot_predictions(y, y + 0.1, y - 0.2, y + np.array([0.3, 0.3, -0.1, 0.3]), unit="m"))
    assert ax.get_title() == "25 % of the intervals miss"
    assert named(ax) == {"holds the truth", "misses it"}
    assert ax.get_xlabel() == "truth [m]"


def test_coverage_against_the_nominal_level():
    levels = [0.5, 0.8, 0.9]
    ax = drawn(plot_coverage({"before": [0.4, 0.6, 0.7], "after": levels}, levels))
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert lines["before"] == [0.4, 0.6, 0.7] and lines["after"] == levels

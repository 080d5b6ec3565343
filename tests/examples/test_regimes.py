"""The regimes: what is changed, the search, tables and figures, and the library's advice."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from scipy import stats

from bayesagg.diagnostics import Advice
from examples.comparison import pipeline, regime_report, regimes
from examples.comparison.regime_report import Point
from examples.comparison.runs import Data, Run, load
from examples.comparison.tasks import measure

ADVICE = Advice({"a": 1.0, "b": 2.0}, 2.0, 0.1, 0.5)


def small(optimizer="adam", **change):
    data = Data("qm9", 1_000, 300, tuple(({"tasks": 11} | change).items()))
    return regimes.Place(
        data, replace(regimes._SETTINGS, epochs=2, warmup_steps=1, optimizer=optimizer)
    )


# --- data ----------------------------------------------------------------------------------------


def test_more_tasks_are_mixtures_of_two():
    data, more = (load(small(tasks=count).data) for count in (5, 30))
    assert [task.name for task in more.tasks[10:13]] == ["cv", "mixture 11", "mixture 12"]
    for a, b in zip((data.train, data.test), (more.train, more.test), strict=True):
        torch.testing.assert_close(a.y, b.y[:, :5])
    targets, mixtures = more.train.y[:, :11], more.train.y[:, 11:]
    torch.testing.assert_close(mixtures.std(0), torch.ones(19))
    found = torch.linalg.lstsq(targets.double(), mixtures.double())
    rest = mixtures - targets @ found.solution.float()
    assert rest.abs().max() < 1e-3
    assert more.model().groups[0].tasks == 30


def test_noise_is_in_what_is_trained_and_chosen_by():
    clean, noisy = load(small().data), load(small(noise=0.4).data)
    for part in ("train", "val"):
        added = getattr(noisy, part).y - getattr(clean, part).y
        assert added.std(0).tolist() == pytest.approx([0.4] * 11, rel=0.2)
    assert noisy.test.y.equal(clean.test.y)


def test_a_scale_changes_labels_and_not_the_measure():
    clean, scaled = load(small().data), load(small(scale=1e3).data)
    torch.testing.assert_close(scaled.train.y[:, 1::2], 1e3 * clean.train.y[:, 1::2])
    assert scaled.train.y[:, ::2].equal(clean.train.y[:, ::2])
    found = [
        measure(data.tasks, {"regression": torch.zeros_like(data.test.y)}, data.test.y, data.scale)
        for data in (clean, scaled)
    ]
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_missing_labels_are_missing_in_training_only():
    data = load(small(missing=0.5).data)
    assert data.train.y.isnan().double().mean() == pytest.approx(0.5, abs=0.05)
    assert not data.val.y.isnan().any() and not data.test.y.isnan().any()


def test_every_line_has_the_common_place():
    found = regimes.places()
    common = regimes.qm9()
    for line, value in (("tasks", 11), ("noise", 0.0), ("scale", 1.0), ("missing", 0.0)):
        assert found[line, value] == common
    assert found["size", 2_000] == common
    for (line, _), place in found.items():
        steps = place.training.epochs * math.ceil((place.data.max_train or 0) / 100)
        assert line == "benchmark" or steps == 400
    sparse = regimes.places(missing=0.9)
    assert sparse["noise", 0.2] == regimes.qm9(missing=0.9, noise=0.2)
    assert sparse["missing", 0.5] == found["missing", 0.5] and sparse.keys() == found.keys()


# --- search --------------------------------------------------------------------------------------


def run(val, test, rate, failure=""):
    values = [] if failure else [[{"mae": v}] for v in (val, test)]
    val, test = values or ([], [])
    return Run("", {"rate": rate}, "", "", val, test, {}, failure, 0.0, 0.0, [])


def test_the_search_goes_on_where_the_edge_is_best(monkeypatch, tmp_path):
    optimum = dict.fromkeys(regimes.METHODS, 3.2e-3) | {"ls": 0.1, "si": 1e-5}
    jobs = []

    def run_all(wanted, *_):
        jobs.extend(wanted)
        rates = [(job.name, job.settings.learning_rate) for job in wanted]
        errors = [1 + abs(math.log(rate / optimum[name])) for name, rate in rates]
        pairs = zip(rates, errors, strict=True)
        return [run(e, math.nan, r, "diverged" if r > 0.2 else "") for (_, r), e in pairs]

    monkeypatch.setattr(regimes, "run_all", run_all)
    methods = dict.fromkeys(regimes.METHODS)
    found = regimes.search([small()], methods, None, 1)
    best = {name: regimes.best(tried) for (_, name), tried in found.items()}
    for name in optimum.keys() - {"si"}:
        assert best[name] == pytest.approx(optimum[name])
    for (_, name), tried in found.items():
        assert set(regimes.RATES) <= set(tried)
        bounded = min(tried) < best[name] < max(tried)
        assert bounded or len(tried) == len(regimes.RATES) + regimes.FURTHEST
    assert {job.settings.seed for job in jobs} == {0}


def test_a_score_is_the_log_of_the_geometric_mean_error():
    kinds = [{"mae": 0.5}, {"accuracy": 0.9, "auroc": 0.8}, {"accuracy": 0.9}]
    found = replace(run(1.0, 1.0, 0.1), test=kinds)
    assert math.exp(regimes.score(found, "test")) == pytest.approx((0.5 * 0.2 * 0.1) ** (1 / 3))
    assert regimes.score(run(1.0, 1.0, 0.1, "diverged"), "test") == math.inf


# --- tables and figures --------------------------------------------------------------------------


def point(shift, line="tasks", value=2, weigh=True, **others):
    base = [-2.0, -1.9, -2.1]
    scores = {"ls": base, "bayesagg": [b + s for b, s in zip(base, shift, strict=True)], **others}
    advice = replace(ADVICE, agreement=0.5 if weigh else 0.9)
    rates = dict.fromkeys(scores, 1e-3)
    return Point(line, value, f"{line} {value}", rates, scores, base, advice)


def test_differences_are_paired_and_in_percent():
    shift = [-0.10, -0.12, -0.11]
    middle, low, high = point(shift).against("bayesagg")
    interval = stats.t.interval(0.95, 2, -0.11, stats.sem(shift))
    expected = [100 * math.expm1(value) for value in (-0.11, *interval)]
    assert [middle, low, high] == pytest.approx(expected)
    assert point(shift).p_value("bayesagg") == pytest.approx(stats.ttest_1samp(shift, 0).pvalue)
    assert point([200.0, 0.0, 600.0]).against("bayesagg")[2] > 1e300  # all but diverged


def test_wins_and_losses_are_counted_and_losses_are_said():
    points = [
        point([-0.10, -0.12, -0.11], value=2),
        point([0.10, 0.12, 0.11], value=5, weigh=False),
        point([0.10, -0.12, 0.01], value=11),
        point([0.10, math.inf, 0.01], value=33, weigh=False),
    ]
    text = regime_report.verdicts(points)
    assert "better in 1, level in 1, worse in 1, failed in 1" in text
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| Number")]
    assert rows == [
        ["| Number of tasks: 5", "worse"],
        ["| Number of tasks: 11", "level"],
        ["| Number of tasks: 33", "failed"],
    ]
    assert "holds in 3 of 4 regimes" in regime_report.advice_table(points)


def test_ranks_and_pairs_of_methods():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 3, generator=generator).double() + torch.tensor([0.0, 0.2, 3.0])
    table = pd.DataFrame(values.numpy(), columns=["a", "b", "c"])
    table.loc[3, "c"] = math.inf  # a failure
    text, matrix = regime_report.differences(table)
    raw = [stats.wilcoxon(table["a"], table["b"]).pvalue]
    raw += [stats.wilcoxon((table[n] - table["c"]).clip(-1e3)).pvalue for n in ("a", "b")]
    assert matrix.loc["a", "b"] == matrix.loc["b", "a"] == pytest.approx(raw[0])
    assert matrix.loc["a", "c"] == pytest.approx(min(1, 3 * min(raw[1:])), rel=1e-6)
    assert f"| c | {table.rank(axis=1)['c'].mean():.2f} |" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where regimes that take a moment are kept, on four lines."""
    found = {("noise", value): small(noise=value) for value in (0.1, 0.4)}
    found = {("noise", 0.0): small(), **found, ("optimizer", "sgd"): small("sgd")}
    found |= {("missing", value): small(missing=value) for value in (0.5, 0.9)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regimes, "qm9", lambda optimizer, **_: small(optimizer))
        patch.setattr(regimes, "_LINE", regimes.RATES)
        patch.setattr(regimes, "FURTHEST", 0)
        patch.setattr(regimes, "METHODS", ("si", "bayesagg"))
        patch.setattr(regimes, "places", lambda **_: found)
        yield tmp_path_factory.mktemp("regimes")


def printed(folder, capsys, *arguments):
    """What the command says, which is what it writes."""
    shared = ["--seeds", "2", "--jobs", "1", "--output", str(folder)]
    assert regimes.main([*arguments, *shared]) == 0
    page = capsys.readouterr().out
    assert page.strip() == (folder / "results.md").read_text().strip()
    return page, [line.removeprefix("## ") for line in page.splitlines() if line.startswith("##")]


def test_the_command_writes_tables_and_figures_and_runs_once(folder, monkeypatch, capsys):
    pytest.importorskip("scikit_posthocs")
    monkeypatch.setattr(regimes, "advice", lambda place: ADVICE)  # takes a hundred steps
    page, titles = printed(folder, capsys)
    assert {"Noise in all labels", "Learning rate of Adam", "What advise says"} <= set(titles)
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {f"regimes-{name}.png" for name in ("noise", "adam", "sgd", "ranks")}
    monkeypatch.setattr(pipeline, "run_job", lambda *_: pytest.fail("ran again"))
    assert printed(folder, capsys)[0] == page


def test_some_lines_and_other_arms(folder, capsys):
    arm = ["--arm", "small prior", '{"rule": {"prior_variance": 0.005}}']
    page, titles = printed(folder, capsys, "--lines", "noise", "--methods", "bayesagg", *arm)
    assert "| error of LS | BayesAgg | small prior |" in page
    assert titles == ["Noise in all labels", "Against linear scalarization", "What advise says"]
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| 0 |")]
    assert len(rows) == 1 and rows[0][2] != rows[0][3].removesuffix(" |")


# --- advice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "weigh"), [({}, True), ({"scale": 1e3}, True), ({"noise": 0.8}, False)]
)
def test_advice_follows_the_regime(change, weigh):
    place = small(**change)
    place = replace(place, data=replace(place.data, max_train=800))
    found = regimes.advice(place)
    assert found.weigh is weigh, str(found)

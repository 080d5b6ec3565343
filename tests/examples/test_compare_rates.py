"""The comparison command at several learning rates."""

import statistics

import pytest
import torch
from scipy import stats

from bayesagg.metrics import delta_m
from examples.comparison import runs
from examples.comparison.benchmarks import SOURCES
from tests.examples.small import compared, content

SMALL = ["nhefs", "--epochs", "2", "--train-size", "120", "--warmup-steps", "1"]


@pytest.fixture(scope="module")
def at_rates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    arguments = ["--methods", "ls", "bayesagg", "--learning-rate", "1e-3", "4e-3"]
    compared(folder, *SMALL, *arguments, "--seeds", "3")
    return folder


def test_every_method_is_trained_at_every_rate_and_single_tasks_at_their_own(at_rates):
    found = content(at_rates)["runs"]
    assert set(found) == {"stl", "ls@0.001", "ls@0.004", "bayesagg@0.001", "bayesagg@0.004"}
    for name, group in found.items():
        expected = float(name.partition("@")[2] or SOURCES["nhefs"].settings.learning_rate)
        assert {run["identity"]["training"]["learning_rate"] for run in group} == {expected}
    assert (at_rates / "results-rates.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_rate_is_that_of_the_validation_part(at_rates):
    page, found = (at_rates / "results.md").read_text(), content(at_rates)
    data = runs.load(runs.Data("nhefs", None, 120))
    names = ("mae", "accuracy", "auroc", "accuracy")

    def metrics(name, part):
        values = [[run[part][k][m] for k, m in enumerate(names)] for run in found["runs"][name]]
        return torch.tensor(values)

    def validation(name):
        single = metrics("stl", "val").mean(0)
        deltas = [delta_m(run, single, data.higher_is_better) for run in metrics(name, "val")]
        return statistics.mean(deltas)

    chosen = {}
    for method, label in (("ls", "LS"), ("bayesagg", "BayesAgg")):
        best = min((f"{method}@{rate}" for rate in (0.001, 0.004)), key=validation)
        line = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
        delta = statistics.mean(found["summary"][best]["delta"])
        assert f"{delta:.2f} ± " in line and f"({best.partition('@')[2]})" in line
        chosen[method] = metrics(best, "test")
        error = 100 * (1 - chosen[method][:, 1:].mean())
        assert f"| {label} |" in page.split("error [%] at")[1]
        assert f"{error:.2f} ± " in page.split("error [%] at")[1]
    # Every task at that rate, with a test of its metric against the reference method.
    lines = page.split("each at its best")[1].splitlines()
    cells = next(line for line in lines if line.startswith("| BayesAgg |")).split(" | ")[2:]
    for k in range(4):
        ours, theirs = chosen["bayesagg"][:, k], chosen["ls"][:, k]
        mean, difference, p = cells[3 * k : 3 * k + 3]
        assert mean.startswith(f"{ours.mean():.4f} ± ")
        assert float(difference.split(" ± ")[0]) == pytest.approx(
            (ours - theirs).mean().item(), abs=1e-4
        )
        assert float(p.strip(" |<")) == pytest.approx(
            stats.ttest_rel(ours, theirs).pvalue, abs=1e-3
        )


def test_pairs_are_tested_without_correction(at_rates):
    page, summary = (at_rates / "results.md").read_text(), content(at_rates)["summary"]
    pairs = [line.split(" | ") for line in page.splitlines() if line.startswith("| LS - BayesAgg")]
    assert [cells[1] for cells in pairs] == ["0.001", "0.004", "best of each"]
    for cells in pairs[:2]:
        a, b = (summary[f"{name}@{cells[1]}"]["delta"] for name in ("ls", "bayesagg"))
        p = stats.ttest_rel(a, b).pvalue
        assert float(cells[3].strip(" |").removeprefix("< ")) == pytest.approx(p, abs=1e-3)
        assert cells[2].startswith(f"{statistics.mean(a) - statistics.mean(b):+.2f}")

"""The trials of the stress suite: their data, and the table."""

import pytest
import torch

from examples.comparison import stress


@pytest.mark.parametrize("trial", stress.TRIALS)
def test_data_depend_on_the_seed_and_tests_have_no_noise(trial):
    make, _ = stress.TRIALS[trial]
    data, again, other = make(0), make(0), make(1)
    assert torch.equal(data.train.y, again.train.y) and torch.equal(data.test.x, again.test.x)
    assert not torch.equal(data.train.y, other.train.y)
    assert data.train.y.shape[1] == data.test.y.shape[1] == len(data.tasks)
    assert data.train.y.isfinite().all()
    spread = data.test.y[:, 0].std().item()
    assert spread == pytest.approx(1, abs=0.1)


def test_what_is_unusual():
    plain, tails = (stress.TRIALS[name][0](0) for name in ("plain", "heavy-tails"))
    kurtosis = [
        part.train.y[:, 3].abs().max() / part.train.y[:, 3].std() for part in (plain, tails)
    ]
    assert kurtosis[1] > 3 * kurtosis[0]
    assert 0.005 < stress.rare(0).train.y[:, 1].mean() < 0.02
    assert not stress.pure_noise(0).test.y[:, -1].any()
    data = stress.rescaled(0)
    rows = torch.arange(5)
    for _ in range(320):
        before = data.train.batch(rows)[1]
    after = data.train.batch(rows)[1]
    torch.testing.assert_close(after[:, 0], 1000 * before[:, 0])
    assert after[:, 1:].equal(before[:, 1:])


def test_the_table_compares_with_linear_scalarization(monkeypatch, capsys):
    monkeypatch.setattr(stress, "_SETTINGS", stress.replace(stress._SETTINGS, epochs=3))
    monkeypatch.setitem(stress.TRIALS, "100-data", (stress.TRIALS["100-data"][0], {"epochs": 20}))
    arguments = ["--trials", "plain", "100-data", "--seeds", "2", "--jobs", "1"]
    assert stress.main([*arguments, "--methods", "bayesagg", "si-readout"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[:2] for line in cells] == [
        [trial, label]
        for trial in ("plain", "100-data")
        for label in ("BayesAgg", "SI, same read-out")
    ]
    assert all(0.3 < float(line[2].split()[0]) < 3 for line in cells)


def test_ratios_are_means_over_seeds_and_failures_are_said():
    plain = [[1.0, 3.0], [2.0, 2.0]]
    _, _, ratio, worst, loss = stress.row("plain", "bayesagg", [[2.0, 2.0], [1.0, 1.0]], plain)
    assert ratio.startswith("0.750") and worst == "1.250" and loss == "2.0000"
    broken = stress.row("plain", "bayesagg", [[float("inf")] * 2, [1.0, 1.0]], plain)
    assert broken[2] == "1 of 2 diverged"
    lost = stress.row(
        "plain", "bayesagg", [[1.0, 3.0], [1.0, 1.0]], [plain[0], [float("inf"), 1.0]]
    )
    assert lost[2] == f"{2.0 / (sum(plain[0]) / 2):.3f}"  # the other seed alone
    assert lost[4].endswith("1 of 2 diverged")

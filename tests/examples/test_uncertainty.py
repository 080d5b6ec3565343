"""The comparison of predictive distributions: scores by their definitions, and one run of it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from examples.comparison.benchmarks import SOURCES, tables
from examples.comparison.tasks import Task
from examples.uncertainty.scores import Belief, coverage, mixture, scores

REGRESSION, BINARY = Task("a", "regression", "mae"), Task("b", "binary", "accuracy")


def test_losses_are_those_of_torch():
    y = torch.randn(50).double()
    mean, scale = torch.randn(50).double(), torch.rand(50).double() + 0.1
    normal = torch.distributions.Normal(mean, scale)
    torch.testing.assert_close(Belief(mean, scale).losses(y), -normal.log_prob(y))
    student = torch.distributions.StudentT(torch.tensor(4.0).double(), mean, scale)
    torch.testing.assert_close(Belief(mean, scale, 4.0).losses(y), -student.log_prob(y))


def test_calibration_is_on_the_other_part():
    y = 3 * torch.randn(20_000).double()
    own = Belief(torch.zeros_like(y), torch.ones_like(y))
    new = Belief(torch.zeros(5).double(), torch.ones(5).double())
    assert float(new.calibrated(own, y).scale[0]) == pytest.approx(3, abs=0.05)
    z = torch.randn(20_000).double()
    labels = torch.bernoulli((z / 4).sigmoid())
    logs = torch.stack([torch.zeros_like(z), z], 1).log_softmax(1)
    found = Belief(logs).calibrated(Belief(logs), labels).mean
    torch.testing.assert_close(found[:, 1] - found[:, 0], z / 4, rtol=0.2, atol=0.1)


def test_a_mixture_has_the_moments_of_its_members():
    members = [
        [Belief(torch.full((1,), m).double(), torch.full((1,), s).double())]
        for m, s in ((0.0, 1.0), (2.0, 2.0))
    ]
    [mixed] = mixture(members)
    assert float(mixed.mean) == 1.0 and float(mixed.scale) == pytest.approx(math.sqrt(2.5 + 1))
    logs = [torch.tensor([[p, 1 - p]]).double().log() for p in (0.2, 0.6)]
    [mixed] = mixture([[Belief(log)] for log in logs])
    assert float(mixed.mean.exp()[0, 0]) == pytest.approx(0.4)


def test_scores_and_coverage():
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
    probabilities = torch.tensor([[0.3, 0.7], [0.8, 0.2]]).double()
    beliefs = [Belief(torch.zeros(2).double(), torch.ones(2).double()), Belief(probabilities.log())]
    found = scores([REGRESSION, BINARY], beliefs, y)
    assert found["brier"] == pytest.approx((0.3**2 + 0.2**2) / 2)
    normal = 0.5 * math.log(2 * math.pi) + 0.25
    binary = -(math.log(0.7) + math.log(0.8)) / 2
    assert found["nll"] == pytest.approx((normal + binary) / 2)
    assert coverage(beliefs, y) == [[0.5, 1.0, 1.0, 1.0]]


def few(*_):
    data = tables.load_nhefs(None, 100)
    rest = {n: getattr(data, n) for n in ("val", "test")}
    return replace(data, **{n: replace(p, x=p.x[:60], y=p.y[:60]) for n, p in rest.items()})


@pytest.mark.slow
def test_the_command_prints_and_saves(tmp_path, capsys, monkeypatch):
    pytest.importorskip("causaldata")
    from examples.uncertainty import __main__ as command

    monkeypatch.setattr(command, "RATES", (1e-3, 4e-3))
    monkeypatch.setitem(command.SOURCES, "nhefs", replace(SOURCES["nhefs"], load=few))
    out = tmp_path / "results.json"
    arguments = ["nhefs", "--seeds", "2", "--epochs", "2", "--only", "plain", "ours"]
    command.main([*arguments, "--out", str(out)])
    printed = capsys.readouterr().out
    saved = json.loads(out.read_text())["nhefs"]
    assert len(saved) == 2
    for name in ("LS, scaled", "BayesAgg, exact, calibrated", "ensemble of 2 LS"):
        assert name in printed and math.isfinite(saved[0][name]["nll"])
    assert "coverage" in printed

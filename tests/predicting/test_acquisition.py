"""What to measure next, against formulas and sampling."""

import math

import pytest
import torch

from bayesagg import RegressionHead, acquisition
from bayesagg.predicting import Predictor
from tests.helpers.data import make_batch
from tests.helpers.nets import plain_net
from tests.predicting.cases import heads_of, loader


def fitted(batches=1, size=20, **kwargs):
    net = plain_net()
    return Predictor.fit(net, heads_of(net), loader(batches=batches, size=size), **kwargs)


def new(size):
    return make_batch(seed=3, size=size)[0]


@pytest.fixture(scope="module")
def predictions():
    return fitted(batches=3).calibrate(loader())(new(5))


def test_variance(predictions):
    for p in predictions.values():
        torch.testing.assert_close(acquisition.variance(p), p.epistemic.sum(-1))


def test_bald_of_a_regression(predictions):
    p = predictions["reg"]
    ratio = p.epistemic / p.aleatoric
    torch.testing.assert_close(acquisition.bald(p), 0.5 * ratio.log1p().sum(1))
    joint = acquisition.bald(p, joint=True)
    eye = torch.eye(5).double()
    # Both carry the factor of the Student-t distribution, so the ratio is that of the model.
    expected = sum(
        0.5 * torch.logdet(eye + p.covariance()[k] / p.aleatoric[0, k]) for k in range(2)
    )
    torch.testing.assert_close(joint, expected)
    assert joint < acquisition.bald(p).sum()  # they tell partly the same


@pytest.mark.parametrize("task", ["bin", "cls"])
def test_bald_of_a_classification(predictions, task):
    p, generator = predictions[task], torch.Generator().manual_seed(0)
    gain = acquisition.bald(p, samples=20_000, generator=generator)
    drawn = p.sample(50_000)
    both = torch.stack([drawn, 1 - drawn], -1) if task == "bin" else drawn
    entropy = torch.special.entr(both).sum(-1).mean(0)
    marginal = torch.special.entr(both.mean(0)).sum(-1)
    expected = marginal - entropy
    torch.testing.assert_close(
        gain, expected.sum(-1) if task == "bin" else expected, rtol=0.05, atol=2e-4
    )
    joint = acquisition.bald(p, joint=True, samples=2000, generator=generator)
    assert 0 < joint < gain.sum() * 1.2 + 0.05


def test_joint_bald_of_one_datum_is_its_own():
    p = fitted(size=10, prior_variance=20.0)(new(1))["cls"]
    generator = torch.Generator().manual_seed(0)
    alone = acquisition.bald(p, samples=4000, generator=generator)
    joint = acquisition.bald(p, joint=True, samples=4000, generator=generator)
    assert float(joint) == pytest.approx(float(alone[0]), abs=0.03)


@pytest.mark.parametrize("nu", [5.0, math.inf])
@pytest.mark.parametrize("maximize", [True, False])
def test_expected_improvement(nu, maximize):
    predictor = fitted()
    predictor.posteriors[0].dof.fill_(nu)
    p = predictor(new(5))["reg"]
    found = acquisition.expected_improvement(p, 0.1, maximize=maximize)
    drawn = p.sample(200_000, generator=torch.Generator().manual_seed(0))
    gain = (drawn - 0.1) if maximize else (0.1 - drawn)
    torch.testing.assert_close(found, gain.clamp(min=0).mean(0), rtol=0.03, atol=1e-3)


def test_expected_improvement_is_for_regressions(predictions):
    with pytest.raises(TypeError, match="regression"):
        acquisition.expected_improvement(predictions["bin"], 0.5)


def test_the_best_value_is_one_or_one_for_each_output(predictions):
    p = predictions["reg"]
    known = torch.tensor([0.1, -2.0], dtype=torch.float64)
    both = acquisition.expected_improvement(p, known)
    for k in range(2):
        alone = acquisition.expected_improvement(p, float(known[k]))
        assert torch.equal(both[:, k], alone[:, k])
    for wrong in (torch.zeros(5), torch.zeros(5, 2), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"one for each output, \[2\].*y\.max"):
            acquisition.expected_improvement(p, wrong)


def test_the_best_values_of_maps_are_along_the_channels():
    """Not along the last dimension, which here has as many."""
    net = torch.nn.Conv2d(3, 2, 1).double()
    x, y = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 2, 2, 2).double()
    p = Predictor.fit(net, {"reg": RegressionHead(net)}, [(x, {"reg": y})])(x)["reg"]
    both = acquisition.expected_improvement(p, torch.tensor([0.0, 3.0]))
    assert torch.equal(both[:, 1], acquisition.expected_improvement(p, 3.0)[:, 1])


def test_predictions_of_all_tasks_are_not_one(predictions):
    for call in (
        lambda: acquisition.variance(predictions),
        lambda: acquisition.bald(predictions),
        lambda: acquisition.expected_improvement(predictions, 0.0),
        lambda: acquisition.select(predictions, 1),
    ):
        with pytest.raises(TypeError, match=r"one task, as in predictor\(x\)"):
            call()
    with pytest.raises(ValueError, match="samples"):
        acquisition.bald(predictions["bin"], samples=0)


@pytest.mark.parametrize("task", ["reg", "bin"])
def test_a_greedy_batch_is_the_formulas(task):
    predictor = fitted()
    p = predictor(new(12))[task]
    posterior = p.posterior
    weight = p.mean * (1 - p.mean) if task == "bin" else torch.ones(12, 2) / posterior.noise
    covariance = posterior.covariance(p.rows)

    def information(rows):
        total = 0.0
        for k in range(2):
            root = weight[rows, k].sqrt()
            block = root[:, None] * covariance[k][rows][:, rows] * root
            total += float(torch.logdet(torch.eye(len(rows)).double() + block))
        return total

    chosen: list[int] = []
    for _ in range(5):
        others = [i for i in range(12) if i not in chosen]
        chosen.append(max(others, key=lambda i: information([*chosen, i])))
    assert acquisition.select(p, 5).tolist() == chosen
    with pytest.raises(ValueError, match="1 to 12"):
        acquisition.select(p, 13)
    with pytest.raises(TypeError, match="classes"):
        acquisition.select(predictor(make_batch()[0])["cls"], 1)

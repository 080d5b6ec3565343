"""Scales, shapes and temperatures from labels that were held out."""

import math

import pytest
import torch
from torch import nn

from bayesagg import RegressionHead
from bayesagg.diagnostics import interval_coverage
from bayesagg.errors import NumericalWarning
from bayesagg.predicting import Predictor
from bayesagg.predicting.student import (
    half_widths,
    student_cdf,
    student_density,
    student_quantile,
)
from tests.helpers.nets import plain_net
from tests.predicting.cases import heads_of, loader


def test_calibration_finds_scale_shape_and_temperature():
    net = plain_net()
    predictor = Predictor.fit(net, heads_of(net), loader())
    [(x, _)] = loader(batches=1, size=1000)
    p = predictor(x)
    noise = torch.distributions.StudentT(torch.tensor(5.0).double()).sample(p["reg"].mean.shape)
    labels = {
        "reg": p["reg"].mean + 3 * p["reg"].scale * noise,
        "bin": torch.bernoulli((p["bin"].output / 2).sigmoid()),
        "cls": torch.distributions.Categorical(logits=p["cls"].output / 2).sample(),
    }
    predictor.calibrate([(x, labels)])
    scales = {task: post.scale for task, post in predictor._named()}
    assert ((scales["reg"] - 3).abs() < 0.2).all()
    assert ((predictor.posteriors[0].dof >= 4) & (predictor.posteriors[0].dof <= 6)).all()

    def loss(task):
        return -float(predictor(x)[task].distribution.log_prob(labels[task]).sum())

    for task, post in predictor._named():
        best = loss(task)
        for factor in (0.8, 1.25):
            post.scale.mul_(factor)
            assert loss(task) > best
            post.scale.div_(factor)


def test_labels_of_one_class_tell_no_temperature():
    """However sure the predictions are, surer ones would be likelier."""
    net = plain_net()
    predictor = Predictor.fit(net, heads_of(net), loader())
    data = loader(batches=2)
    for _, labels in data:
        labels["bin"][:, 1], labels["cls"][:] = 1, 2
    with pytest.warns(NumericalWarning) as caught:
        predictor.calibrate(data)
    assert {one.filename for one in caught} == {__file__}
    said = [str(one.message) for one in caught]
    assert len(said) == 2 and "'bin': all labels of output 1" in said[0] and "'cls'" in said[1]
    scales = {task: posterior.scale.tolist() for task, posterior in predictor._named()}
    assert scales["bin"][0] != 1 and scales["bin"][1] == 1 and scales["cls"] == [1]


def test_labels_that_are_all_predicted_right_tell_no_temperature():
    """Colder is likelier without end; a label between two classes ends it."""
    net = plain_net()
    predictor = Predictor.fit(net, heads_of(net), loader())
    x, labels = loader(batches=1, size=12)[0]
    found = predictor(x)
    labels["bin"] = (found["bin"].mean > 0.5).float()
    labels["cls"] = found["cls"].mean.argmax(1)
    soft = {**labels, "bin": found["bin"].mean, "cls": found["cls"].mean}
    with pytest.warns(NumericalWarning, match="all labels.* are predicted right") as caught:
        predictor.calibrate([(x, labels)])
    assert len(caught) == 2
    scales = {task: posterior.scale.tolist() for task, posterior in predictor._named()}
    assert scales["bin"] == [1, 1] and scales["cls"] == [1]
    assert (predictor(x)["cls"].mean == found["cls"].mean).all()
    predictor.calibrate([(x, soft)])  # without a warning
    for task in ("bin", "cls"):
        torch.testing.assert_close(predictor(x)[task].mean, found[task].mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise", ["learned", 4.0])
def test_calibrated_intervals_hold_residuals_of_any_distribution(noise):
    """Skewed labels and uniform ones, which no Student-t distribution has the shape of."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 2)
    head = {"reg": RegressionHead(net, noise_variance=noise)}

    def draw(size):
        x = torch.randn(size, 3, generator=generator)
        error = torch.rand(size, 2, generator=generator) * 4
        error[:, 1] = torch.randn(size, generator=generator).exp()
        return x, {"reg": x.sum(1, keepdim=True) + error}

    predictor = Predictor.fit(net, head, [draw(2000)])
    x, y = draw(40_000)
    levels = (0.05, 0.5, 0.8, 0.95, 0.997)
    nominal = torch.tensor(levels)[:, None]
    before = interval_coverage(predictor(x)["reg"], y["reg"], levels)
    assert (before - nominal).abs().max() > 0.05
    predictor.calibrate([draw(20_000)])
    after = interval_coverage(predictor(x)["reg"], y["reg"], levels)
    assert (after - nominal).abs().max() < 0.012
    saved = Predictor(net, head)
    saved.load_state_dict(predictor.state_dict())
    for a, b in zip(saved(x)["reg"].interval(0.6), predictor(x)["reg"].interval(0.6), strict=True):
        assert torch.equal(a, b)


def test_half_widths_of_few_residuals():
    """The p (n + 1)-th smallest, between its neighbours; beyond the largest a Student-t's tail."""
    halves = half_widths(torch.tensor([3.0, -1.0, 2.0]).double(), 5.0)
    torch.testing.assert_close(halves[[49, 99, 124]], torch.tensor([1.0, 2.0, 2.5]).double())
    tail = student_quantile(0.975, torch.tensor(5.0).double())
    least = student_quantile(0.875, torch.tensor(5.0).double())
    torch.testing.assert_close(halves[189], 3 * tail / least)
    none = half_widths(torch.zeros(0).double(), 5.0)
    torch.testing.assert_close(none[189], tail)
    assert (halves.diff() >= 0).all() and (none.diff() > 0).all()


@pytest.mark.parametrize("nu", [2.5, 4.0, 29.0, 31.0, 1e4, math.inf])
def test_student_functions_against_scipy(nu):
    stats = pytest.importorskip("scipy.stats")
    t = torch.linspace(-30, 30, 101).double()
    dof = torch.tensor(nu).double()
    expected = stats.norm if nu == math.inf else stats.t(nu)
    torch.testing.assert_close(
        student_cdf(t, dof), torch.from_numpy(expected.cdf(t.numpy())), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        student_density(t, dof), torch.from_numpy(expected.pdf(t.numpy())), rtol=1e-7, atol=1e-12
    )
    for probability in (0.025, 0.5, 0.8, 0.995):
        found = float(student_quantile(probability, dof))
        assert found == pytest.approx(expected.ppf(probability), abs=1e-7)

"""Conflict, certainty and calibration against their definitions, taken one by one."""

import itertools

import pytest
import torch

from bayesagg.diagnostics import (
    advise,
    brier_score,
    expected_calibration_error,
    gradient_certainty,
    gradient_conflict,
    interval_coverage,
    reliability,
)
from bayesagg.predicting import Predictor
from tests.helpers.data import make_batch
from tests.helpers.nets import plain_net
from tests.predicting.cases import heads_of, loader


def test_conflict_counts_pairs_that_point_apart():
    mean = torch.randn(7, 4, 3)
    expected = [0.0] * 4
    for datum, (a, b) in itertools.product(mean, itertools.permutations(range(4), 2)):
        expected[a] += float(datum[a] @ datum[b] < 0) / (7 * 3)
    assert gradient_conflict(mean).tolist() == pytest.approx(expected)
    assert gradient_conflict(mean[:, :1].repeat(1, 2, 1)).tolist() == [0, 0]
    assert gradient_conflict(torch.cat([mean[:, :1], -mean[:, :1]], 1)).tolist() == [1, 1]


def test_certainty_is_the_median_signal_to_noise_ratio():
    mean, variance = torch.randn(5, 2, 3), torch.rand(5, 2, 3) + 0.1
    for k in range(2):
        pairs = zip(mean[:, k], variance[:, k], strict=True)
        ratios = [float(m.norm() / v.sum() ** 0.5) for m, v in pairs]
        assert float(gradient_certainty(mean, variance)[k]) == pytest.approx(sorted(ratios)[2])
    assert gradient_certainty(mean, torch.zeros(5, 2, 3)).isfinite().all()


def test_reliability_bins_by_confidence():
    probabilities = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [0.0, 1.0]])
    table = reliability(probabilities, torch.tensor([1, 1, 0, 0]), bins=2)
    assert table.count.tolist() == [1, 3]  # a confidence on the edge belongs to the lower bin
    assert table.confidence.tolist() == pytest.approx([0.5, 0.9])
    assert table.accuracy.tolist() == pytest.approx([0, 2 / 3])


def test_calibration_error_is_the_weighted_gap():
    p, y = torch.rand(200, 3).softmax(1), torch.randint(3, (200,))
    confidence, predicted = p.max(1)
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = (predicted == y)[inside].double().mean() - confidence[inside].double().mean()
            expected += float(gap.abs() * inside.sum() / 200)
    assert expected_calibration_error(p, y) == pytest.approx(expected, rel=1e-6)


def test_a_binary_probability_is_that_of_class_one():
    p, y = torch.rand(50, dtype=torch.float64), torch.randint(2, (50,))
    both = torch.stack([1 - p, p], 1)
    assert brier_score(p, y) == pytest.approx(2 * float((p - y).square().mean()))
    assert brier_score(p, y) == pytest.approx(brier_score(both, y))
    assert expected_calibration_error(p, y) == expected_calibration_error(both, y)
    column = p[:, None], y[:, None].double()  # as a head predicts it
    assert brier_score(*column) == brier_score(column[0], y) == brier_score(p, y)
    assert brier_score(*(value.numpy() for value in column)) == brier_score(p, y)


def test_perfect_and_worst_scores():
    y = torch.tensor([0, 1])
    assert brier_score(torch.eye(2), y) == expected_calibration_error(torch.eye(2), y) == 0
    assert brier_score(torch.eye(2), 1 - y) == 2
    assert expected_calibration_error(torch.eye(2), 1 - y) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_conflict(torch.ones(2, 3)), "data, tasks, dimensions"),
        (lambda: gradient_conflict(torch.ones(2, 1, 3)), "two tasks"),
        (lambda: gradient_certainty(torch.ones(2, 1, 3), torch.ones(2, 1, 2)), "agree"),
        (lambda: brier_score(torch.tensor([2.0]), torch.tensor([1])), r"\[0, 1\]"),
        (lambda: brier_score(torch.tensor([0.5]), torch.tensor([2])), "0 to 1"),
        (lambda: brier_score(torch.ones(2, 2), torch.tensor([1])), "class indices"),
        (lambda: brier_score(torch.rand(3, 2), torch.zeros(3)), "sum to one.* one at a time"),
        (lambda: brier_score(torch.rand(2, 3), torch.zeros(2, 3)), "binary outputs pass one"),
        (lambda: brier_score(torch.rand(3), torch.rand(3)), "whole numbers from 0 to 1"),
        (lambda: brier_score(torch.rand(2), torch.tensor([1, torch.nan])), "leave.* out"),
        (lambda: brier_score(torch.rand(2), torch.tensor([1, -100])), "leave.* out"),
        (lambda: reliability(torch.rand(2), torch.tensor([1, 0]), 0), "bins must be a positive"),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_interval_coverage_counts_labels_inside():
    net = plain_net()
    predictor = Predictor.fit(net, heads_of(net), loader())
    p = predictor(make_batch(seed=9)[0])["reg"]
    low, high = p.interval(0.5)
    targets = torch.stack([(low + high)[:, 0] / 2, high[:, 1] + 1], 1)
    targets[0, 1] = torch.nan
    shares = interval_coverage(p, targets, (0.5, 0.999999))
    assert shares.tolist() == [[1, 0], [1, 1]]
    with pytest.raises(ValueError, match="shape"):
        interval_coverage(p, targets[:1], (0.5,))


# --- advice --------------------------------------------------------------------------------------


def gradients_of(factors, count=60):
    """Features, and losses of tasks whose gradients have these lengths, at right angles or not."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(count, 5, generator=generator, dtype=torch.float64).requires_grad_()
    residuals = torch.randn(count, len(factors), generator=generator, dtype=torch.float64)
    weights = torch.randn(len(factors), 5, generator=generator, dtype=torch.float64)
    outputs = h @ weights.mT
    targets = outputs.detach() - residuals * torch.tensor(factors, dtype=torch.float64)
    return h, outputs, targets


def test_advice_against_its_definitions():
    h, outputs, targets = gradients_of([0.1, 1.0, 3.0])
    losses = (outputs - targets).square().mean(0)
    found = advise(h, {"a": losses[0], "b": losses[1:]})
    rows = [
        torch.autograd.grad(value, h, retain_graph=True)[0].flatten().tolist() for value in losses
    ]
    scales = losses.tolist()

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    assert list(found.scales) == ["a", "b[0]", "b[1]"]
    assert list(found.scales.values()) == pytest.approx(scales)
    assert found.ratio == pytest.approx(max(scales) / min(scales))
    pairs = [cosine(a, b) for a, b in itertools.combinations(rows, 2)]
    assert found.cosine == pytest.approx(sum(pairs) / 3)
    plain = [sum(column) for column in zip(*rows, strict=True)]
    weighed = [
        sum(x / s for x, s in zip(column, scales, strict=True))
        for column in zip(*rows, strict=True)
    ]
    assert found.agreement == pytest.approx(cosine(plain, weighed))
    assert outputs.grad_fn is not None and h.grad is None


@pytest.mark.parametrize(
    ("factors", "weigh", "says"),
    [
        ([1.0, 1.0, 1.0], False, "hardly changes the direction"),
        ([0.1, 1.0, 10.0], True, "Weigh the tasks"),
    ],
)
def test_advice_in_words(factors, weigh, says):
    h, outputs, targets = gradients_of(factors)
    found = advise(h, {"tasks": (outputs - targets).square().mean(0)})
    assert found.weigh is weigh and says in str(found)
    assert f"agreement of plain and weighed gradient {found.agreement:.2f}" in str(found)


def test_advice_needs_tasks_and_positive_losses_of_the_features():
    h, outputs, targets = gradients_of([1.0, 1.0])
    losses = (outputs - targets).square().mean(0)
    for given, message in (
        ({"a": losses[0]}, "at least two tasks"),
        ({"a": losses[0], "b": losses[1] * 0}, "'b' is 0"),
        ({"a": losses[0], "b": losses[1] * torch.nan}, "'b' is nan"),
        ({"a": losses[0], "b": torch.ones(()).requires_grad_()}, "'b' does not depend"),
        ({"a": losses[0], "b": losses[1].detach()}, "'b' does not depend.* with gradients"),
        ({"a": losses[:, None]}, "'a' has shape"),
        ({"a": losses[0], "b": losses[1] * 0 + 1}, "'b' is zero at the features"),
        ({"a": losses[0], "b": 1.0}, "'b' is a float: pass the tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            advise(h, given)
    named = advise(h, {"0": losses[0], "1": losses[1]})
    assert advise(h, [losses[0], losses[1]]) == named  # a sequence, as of heads

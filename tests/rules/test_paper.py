"""The paper's rule as an object: settings, its memory, and what the recorded runs do not cover."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.errors import CheckpointError
from bayesagg.rules import PaperRule
from bayesagg.rules.epochs import WARMUP, default_memory
from tests.rules.parts import (
    D,
    absent,
    batch_of,
    linear,
    mixed,
    plan_of,
    randn,
    start,
    step,
)

# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrain_epochs": -1},
        {"pretrain_epochs": 1.0},
        {"pretrain_epochs": True},
        {"gradient_scale": "median"},
        {"covariance": "none"},
        {"max_data": 0},
        {"max_data": 2.5},
        {"max_data": 8, "covariance": "full"},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PaperRule(**settings)


def test_it_weighs_out_of_the_box():
    heads = {"a": RegressionHead(linear(1)), "b": RegressionHead(linear(1, 1))}
    rule = PaperRule(pretrain_epochs=0)
    memory = start(rule, heads, 1)
    assert memory.groups[0].s == (0.8, 0.8)
    assert memory.groups[0].inferred == ("a", "b")
    weights = plan_of(rule, memory, batch_of(heads)).weights
    assert abs(float(weights["a"]) - 0.5) > 0.01
    classified = start(rule, {"c": BinaryHead(linear(1)), "d": MulticlassHead(linear(3))})
    assert [group.s for group in classified.groups] == [(0.05,), (0.05,)]
    assert not any(group.inferred for group in classified.groups)


def test_samples_without_effect():
    with pytest.warns(UserWarning, match="task 'b': num_samples has no effect"):
        start(PaperRule(), {"b": BinaryHead(linear(1), num_samples=64)})


# --- a step --------------------------------------------------------------------------------------


def test_losses_that_are_not_the_likelihood_keep_their_gradient():
    heads, rule = (
        {"a": RegressionHead(linear(1)), "own": RegressionHead(linear(2, 1))},
        PaperRule(0),
    )
    gradient = randn(8, 2, seed=9)

    def own(part):
        return replace(part, labels=None, gradient=gradient)

    memory = start(rule, heads, 1)
    alone = plan_of(rule, memory, batch_of(heads, own=absent))
    plan = step(rule, memory, batch_of(heads, own=own))
    expected = alone.gradients[(1,)] + gradient @ heads["own"].weights()
    torch.testing.assert_close(plan.gradients[(1,)], expected)
    torch.testing.assert_close(plan.weights["own"], torch.full((2,), 1 / 3).double())
    torch.testing.assert_close(plan.weights["a"], torch.full((1,), 1 / 3).double())
    assert plan.spared == ("a",)
    assert set(memory.stepped()) == {"a"}
    mean = PaperRule(0, gradient_scale="mean")
    averaged = plan_of(mean, start(mean, heads, 1), batch_of(heads, own=own))
    torch.testing.assert_close(averaged.gradients[(1,)] * 3, expected)


def test_a_head_is_not_written_once_its_loss_was_another():
    heads, rule = {"a": RegressionHead(linear(1)), "b": RegressionHead(linear(1, 1))}, PaperRule(0)
    memory = start(rule, heads, 2)
    step(rule, memory, batch_of(heads))
    memory.stepped()
    step(rule, memory, batch_of(heads, b=lambda part: replace(part, labels=None)))
    assert set(memory.stepped()) == {"a"}
    assert plan_of(rule, memory, batch_of(heads)).spared == ("a",)


# --- without epochs ------------------------------------------------------------------------------


def test_three_arguments_infer_after_the_warm_up():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"trunk": nn.Sequential(nn.Linear(4, D), nn.Tanh()), "a": nn.Linear(D, 2)}
    )
    model["b"] = nn.Linear(D, 1)
    heads = {"a": RegressionHead(model["a"]), "b": BinaryHead(model["b"])}
    optimizer = BayesAggWrapper(
        torch.optim.SGD(model.parameters(), lr=0.01), model["trunk"], heads, rule="paper"
    )
    memory = optimizer.engine._memory
    for i in range(WARMUP + 2):
        h = model["trunk"](torch.randn(16, 4))
        losses = {
            "a": F.mse_loss(model["a"](h), torch.randn(16, 2)),
            "b": F.binary_cross_entropy_with_logits(model["b"](h), torch.ones(16, 1)),
        }
        optimizer.zero_grad()
        optimizer.step(losses)
        uniform = torch.full((2,), 1 / 3)
        alike = torch.allclose(optimizer.task_weights["a"].float(), uniform)
        assert alike == (i < WARMUP)
        faded = memory.states[0].faded
        precision = faded.precision[0] + torch.eye(D + 1)
        mean = torch.linalg.solve(precision, faded.shift.mT).mT.float()
        written = torch.cat([model["a"].weight, model["a"].bias[:, None]], 1).detach()
        assert torch.allclose(written, mean, atol=1e-5) == (i >= WARMUP)


def test_evidence_fades_by_the_datum():
    heads, rule = {"a": RegressionHead(linear(2))}, PaperRule()
    memory = start(rule, heads)
    first = step(rule, memory, batch_of(heads, 0, rows=6)).update.evidence[0]
    second = step(rule, memory, batch_of(heads, 1, rows=10)).update.evidence[0]
    fading = torch.exp(-torch.tensor(10.0).double() / default_memory(D + 1, torch.tensor(10.0)))
    faded = memory.states[0].faded
    torch.testing.assert_close(faded.precision, fading * first.precision + second.precision)
    torch.testing.assert_close(faded.shift, fading * first.shift + second.shift)
    torch.testing.assert_close(memory.states[0].running.shift, first.shift + second.shift)


def test_evidence_of_an_absent_task_does_not_fade():
    heads, rule = {"a": RegressionHead(linear(1)), "b": RegressionHead(linear(1, 1))}, PaperRule()
    memory = start(rule, heads)
    step(rule, memory, batch_of(heads))
    before = memory.states[0].faded
    for seed in range(3):
        step(rule, memory, batch_of(heads, seed, b=absent))
    after = memory.states[0].faded
    torch.testing.assert_close(after.shift[1], before.shift[1])
    torch.testing.assert_close(after.precision[1], before.precision[0])
    assert after.count[0] > after.count[1] == before.count[1]


def test_the_first_end_of_an_epoch_makes_it_epochs():
    heads, rule = mixed(), PaperRule()
    memory = start(rule, heads)
    plans = [step(rule, memory, batch_of(heads, seed)) for seed in range(2)]
    assert memory.fades and memory.pretraining
    assert set(memory.end_epoch()) == {"reg"}
    assert not memory.fades and not memory.pretraining
    total = plans[0].update.evidence[0] + plans[1].update.evidence[0]
    torch.testing.assert_close(memory.states[0].full.precision, total.precision)
    plan = step(rule, memory, batch_of(heads, 2))
    assert plan.heads == {} and memory.states[0].faded is None


# --- checkpoints ---------------------------------------------------------------------------------


def trained(steps_per_epoch=2):
    heads, rule = mixed(), PaperRule()
    memory = start(rule, heads, steps_per_epoch)
    for seed in range(3):
        step(rule, memory, batch_of(heads, seed))
        memory.stepped()
    own = batch_of(heads, 3, bin=lambda part: replace(part, labels=None))
    step(rule, memory, own)
    return rule, heads, memory


def test_a_state_of_other_settings_is_refused():
    rule, _, memory = trained()
    other = {**mixed(), "bin": BinaryHead(linear(2, 1), moments="monte_carlo", num_samples=8)}
    fixed = {**mixed(), "reg": RegressionHead(linear(2))}
    with pytest.raises(CheckpointError, match="noise variance"):
        start(rule, fixed, 2).loaded(memory.state_dict(), torch.device("cpu"))
    assert start(rule, other, 2).loaded(memory.state_dict(), torch.device("cpu")).draws == 4

"""The library among the compared methods: its settings, its ablations and its read-out."""

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from bayesagg import LikelihoodRule
from bayesagg.presets import PAPER
from examples import methods as updates
from examples.comparison.ablations import InSampleRule, PriorInNoiseRule
from examples.comparison.catalogue import ablations, methods
from examples.comparison.networks import mlp
from examples.comparison.tasks import criterion
from examples.methods import BayesAggregation
from examples.training import TrainSettings
from tests.examples.small import ALL, CATALOGUE, TASKS, build, regressions

# --- the library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["qm9", "cifar_mtl", "chestxray14", "utkface"])
def test_the_papers_arm_has_its_preset(preset):
    method = methods(preset)["bayesagg-paper"]
    described = method.described()
    assert described["rule"]["gradient_scale"] == "mean"
    for kind, grid in PAPER[preset].s_grid.items():
        assert described["heads"][kind]["s"] == getattr(PAPER[preset], kind)["s"]
        assert method.space[f"heads.{kind}.s"] == grid
        changed = method.with_settings({f"heads.{kind}.s": 0.7}).described()
        assert changed["heads"][kind]["s"] == 0.7
        assert method.described() == described  # unchanged by it
    # Nothing that another process would describe otherwise: an object's address, a private field.
    assert "0x" not in str(described) and " _" not in str(described).replace("'", " ")


@pytest.mark.parametrize(("epochs", "pretraining"), [(100, 10), (40, 4), (3, 1)])
def test_the_papers_arm_has_its_share_of_pretraining(epochs, pretraining):
    method = CATALOGUE["bayesagg-paper"]
    settings = TrainSettings(epochs=epochs)
    engine = method.update(mlp(5, (6, 4), TASKS), settings, 7, **method.settings).optimizer.engine
    assert engine.rule.pretrain_epochs == pretraining and engine.steps_per_epoch == 7


def test_the_default_is_three_arguments_and_another_warmup_is_that_of_all():
    method = CATALOGUE["bayesagg"]
    given = []
    with pytest.MonkeyPatch.context() as patch:
        real = updates.BayesAggWrapper
        patch.setattr(
            updates, "BayesAggWrapper", lambda *a, **k: given.append((len(a), k)) or real(*a, **k)
        )
        for settings in (TrainSettings(), TrainSettings(warmup_steps=7)):
            method.update(mlp(5, (6, 4), TASKS), settings, 3, **method.settings)
    assert given == [(3, {}), (3, {"rule": replace(LikelihoodRule(), warmup=7)})]


def test_ablations_differ_from_the_default_in_one_thing():
    default, found = LikelihoodRule(), {}
    for name, method in ablations().items():
        model = mlp(5, (6, 4), TASKS)
        engine = method.update(model, TrainSettings(), 3, **method.settings).optimizer.engine
        changed = {
            field.name
            for field in fields(default)
            if getattr(engine.rule, field.name) != getattr(default, field.name)
        }
        heads = [(h.readout, getattr(h, "noise_variance", None)) for h in engine.heads.values()]
        found[name] = changed | {type(engine.rule)} - {LikelihoodRule}
        assert found[name] or any(h != (None, None) for h in heads), name
        assert len(found[name]) <= 1
    memory = {"memory-2": 10, "memory-5": 25, "memory-40": 200}  # heads have 5 weights
    for name, expected in memory.items():
        method = ablations()[name]
        update = method.update(mlp(5, (6, 4), TASKS), TrainSettings(), 3, **method.settings)
        assert update.optimizer.engine.rule.memory == expected


def train_both(rules, steps=30):
    """Heads of regressions, and the gradient of the backbone, after some steps under each rule."""
    x, y = torch.randn(40, 5), torch.randn(40, 2)
    found = []
    for rule in rules:
        torch.manual_seed(0)
        update, _ = build(BayesAggregation, regressions(2), rule=rule)
        for _ in range(steps):
            update.step(criterion(regressions(2))(update.model(x), y))
        found.append(nn.utils.parameters_to_vector(update.model.parameters()))
    return found


def test_predictions_that_have_seen_the_datum_give_other_gradients():
    rule, other = LikelihoodRule(warmup=0), InSampleRule(warmup=0)
    first, second, third = train_both((rule, other, rule))
    assert first.equal(third), "the replacement outlives the ablation"
    assert (first - second).abs().max() > 1e-4


def test_a_prior_in_units_of_the_noise_is_a_fixed_ridge():
    x, y = torch.randn(40, 5), torch.randn(40, 2)
    update, _ = build(BayesAggregation, regressions(2), rule=PriorInNoiseRule(warmup=0, memory=1))
    h = torch.cat([update.model.backbone(x), torch.ones(40, 1)], 1).detach().double()
    update.step(criterion(regressions(2))(update.model(x), y))
    head = update.model.heads["regression"]
    small = (h[:, :-1].square().mean() / 0.1).clamp(max=1)  # features, which the prior knows
    gram = h.T @ h + small * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(gram, h.T @ y.double()).T
    found = torch.cat([head.weight, head.bias[:, None]], 1).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --- other methods with the library's read-out ---------------------------------------------------

READOUTS = ("ls-readout", "si-readout", "uw-readout")


@pytest.mark.parametrize("name", READOUTS)
def test_the_trunk_gets_the_methods_own_gradient_and_heads_the_librarys(name):
    base = CATALOGUE[name.removesuffix("-readout")].update
    update, losses = build(ALL[name].update, **ALL[name].settings)
    plain, _ = build(base)
    for _ in range(3):
        plain.model.load_state_dict(update.model.state_dict())
        if name == "uw-readout":
            plain.scalarizer.log_var.data.copy_(update._base.scalarizer.log_var.data)
            plain.scalarizer.log_var.grad = None
        plain.model.zero_grad()
        now = losses()
        values = torch.stack(list(now.values()))
        shared = list(update.model.backbone.parameters())
        detached = values.detach().requires_grad_()
        plain.objective(detached).backward()
        expected = torch.autograd.grad((detached.grad * values).sum(), shared, retain_graph=True)
        update.step(now)
        for parameter, gradient in zip(shared, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
        assert all(p.grad is None for p in update.model.heads.parameters())
        torch.testing.assert_close(
            update.task_weights(), detached.grad / detached.grad.sum(), rtol=1e-4, atol=1e-6
        )
    if name == "uw-readout":
        assert (update._base.scalarizer.log_var != 0).all()


@pytest.mark.parametrize("name", READOUTS)
def test_the_read_out_is_that_of_the_default(name):
    """With a trunk that does not move, every method has the heads of the default."""
    heads = []
    for method in (ALL["bayesagg"], ALL[name]):
        torch.manual_seed(0)
        update, losses = build(method.update, **method.settings)
        for parameter in update.model.backbone.parameters():
            parameter.requires_grad_(False)
        for _ in range(4):
            update.step(losses())
        heads.append(nn.utils.parameters_to_vector(update.model.heads.parameters()))
    torch.testing.assert_close(*heads)


@pytest.mark.parametrize("name", READOUTS)
def test_its_warm_up_is_that_of_the_default(name):
    """Labels of hundreds count in units of their own, in either."""
    x, y = torch.randn(40, 5), 300 * torch.randn(40, 2)
    models = []
    for method in (ALL["bayesagg"], ALL[name]):
        torch.manual_seed(0)
        model, settings = mlp(5, (6, 4), regressions(2)), TrainSettings(warmup_steps=3)
        update = method.update(model, settings, 3, **method.settings)
        for _ in range(3):
            update.step(criterion(regressions(2))(model(x), y))
        models.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*models, rtol=0, atol=0)


def test_bayesagg_has_one_head_of_a_kind_and_a_weight_per_task():
    method = CATALOGUE["bayesagg"]
    update, losses = build(method.update, **method.settings)
    assert isinstance(update, BayesAggregation)
    assert list(update.optimizer.engine.heads) == ["regression", "binary", "c0"]
    for _ in range(4):
        update.step(losses())
    weights = update.task_weights()
    assert weights.shape == (4,)
    assert weights.sum().item() == pytest.approx(1)

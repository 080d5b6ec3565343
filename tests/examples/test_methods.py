"""Each compared method by what defines it, so that a baseline that is silently wrong is caught."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from bayesagg import LikelihoodRule
from bayesagg.presets import PAPER
from examples import methods as updates
from examples.comparison.ablations import InSampleRule, PriorInNoiseRule
from examples.comparison.benchmark import table_benchmark
from examples.comparison.catalogue import ablations, methods, more_methods
from examples.comparison.gap import Agent, ImprovableGapBalancing
from examples.comparison.gradients import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    FairGrad,
    GradientWeighting,
    PCGrad,
    fair_weights,
)
from examples.comparison.networks import SeparateNets, TaskNet, mlp, single_task
from examples.comparison.tasks import Task, by_task, criterion
from examples.comparison.weighting import (
    FAMO,
    DynamicWeightAverage,
    RandomLossWeighting,
    UncertaintyWeighting,
)
from examples.methods import BayesAggregation, LinearScalarization, ScaleInvariant
from examples.training import TrainSettings, train

TASKS = (
    Task("r0", "regression", "mae"),
    Task("r1", "regression", "mae"),
    Task("b0", "binary", "auroc"),
    Task("c0", "multiclass", "accuracy", classes=3),
)
AT_ONCE = TrainSettings(warmup_steps=0)  # no warm-up
CATALOGUE = methods("utkface")
# Ensembles and torch-rechub's methods have networks of their own.
ALL = CATALOGUE | {
    n: m for n, m in more_methods("utkface").items() if not n.startswith(("ensemble", "rechub"))
}
GRADIENT = [n for n, m in CATALOGUE.items() if issubclass(m.update, GradientWeighting)]


def build(update, tasks=TASKS, **own):
    """The update on a small network, and a batch's losses by a function."""
    model = mlp(5, (6, 4), tasks)
    x, y = torch.randn(20, 5), targets(20, tasks)
    return update(model, AT_ONCE, 3, **own), lambda: criterion(tasks)(model(x), y)


def targets(count, tasks=TASKS):
    columns = {
        "regression": lambda: torch.randn(count),
        "binary": lambda: torch.randint(2, (count,)).float(),
        "multiclass": lambda: torch.randint(3, (count,)).float(),
    }
    return torch.stack([columns[task.kind]() for task in tasks], 1)


def regressions(count):
    return tuple(Task(f"r{k}", "regression", "mae") for k in range(count))


def combination(update, rows):
    """Weights that the update gives gradients, and their combination."""
    weights = update._weigh(rows)
    return weights, weights @ rows


def scaled_rows(tasks, dimensions, spread=1.0):
    rows = torch.randn(tasks, dimensions, dtype=torch.float64)
    return rows * torch.logspace(0, spread, tasks, dtype=torch.float64)[:, None]


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(120, 5, generator=generator, dtype=torch.float64)
    y = torch.stack([x[:, 0], x[:, 1] * 3, (x[:, 2] > 0) * 1.0, (x[:, 3] > 0) + (x[:, 4] > 1.0)], 1)
    return table_benchmark(
        TASKS,
        x,
        y,
        torch.arange(120).split([80, 20, 20]),
        widths=(6, 4),
        version={},
        package="torch",
        max_train=None,
    )


# --- what all share ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", [name for name in ALL if name != "without-warmup"])
def test_the_first_steps_are_those_of_linear_scalarization(name, optimizer, data):
    """Of the paper's rule the first epoch, which has as many here."""
    settings = TrainSettings(
        epochs=1,
        warmup_steps=4,
        batch_size=20,
        clip_norm=0.5,
        weight_decay=0.1,
        optimizer=optimizer,
    )
    backbones = []
    for method in (ALL["ls"], ALL[name]):
        torch.manual_seed(0)
        model = data.model()
        update = method.update(model, settings, 4, **method.settings)
        train(model, update, data, criterion(TASKS), settings)
        backbones.append(nn.utils.parameters_to_vector(model.backbone.parameters()))
    torch.testing.assert_close(*backbones)


@pytest.mark.parametrize("name", ALL)
def test_it_trains_in_its_own_way_within_the_clipping(name, data):
    settings = TrainSettings(
        epochs=3, warmup_steps=4, batch_size=20, clip_norm=0.01, learning_rate=0.01
    )
    method = ALL[name]
    torch.manual_seed(0)
    model = data.model()
    update = method.update(model, settings, 4, **method.settings)
    with torch.no_grad():
        start = sum(criterion(TASKS)(model(data.train.x), data.train.y).values())
    history = train(model, update, data, criterion(TASKS), settings)
    with torch.no_grad():
        end = sum(criterion(TASKS)(model(data.train.x), data.train.y).values())
    assert end < start
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert torch.cat(gradients).norm() <= 0.01 * (1 + 1e-4)
    if update.task_weights() is not None:
        assert len(history.weights[-1]) == len(TASKS)
        alike = {"pcgrad", "ls-readout", "bayesagg-paper-s0"}
        assert name in alike or torch.tensor(history.weights[-1]).std() > 1e-6


def test_networks_of_single_tasks_are_clipped_one_by_one():
    torch.manual_seed(0)
    model = single_task(5, (6, 4), TASKS)
    x, y = torch.randn(20, 5), targets(20)
    settings = TrainSettings(clip_norm=0.01, warmup_steps=0)
    update = LinearScalarization(model, settings, 3)
    update.step(criterion(TASKS)(model(x), y))
    norms = [torch.cat([g.flatten() for g in own]).norm() for own in model.network_gradients()]
    torch.testing.assert_close(torch.stack(norms), torch.full((4,), 0.01), rtol=1e-3, atol=0)
    total = nn.utils.get_total_norm(p.grad for p in model.parameters())
    assert total == pytest.approx(0.02, rel=1e-3)  # no parameter is in two networks, or in none


def test_single_task_networks_train_as_if_alone(data):
    settings = TrainSettings(epochs=3, batch_size=20, warmup_steps=0)
    networks = [mlp(5, (6, 4), [task]) for task in TASKS]
    together = SeparateNets(copy.deepcopy(networks), TASKS)
    train(together, LinearScalarization(together, settings, 4), data, criterion(TASKS), settings)
    found = by_task(TASKS, together(data.test.x))
    for k, (alone, task) in enumerate(zip(networks, TASKS, strict=True)):
        before = next(iter(alone(data.test.x).values())).detach()
        own = criterion([task])
        update = LinearScalarization(alone, settings, 4)
        train(alone, update, data, lambda z, y, k=k, own=own: own(z, y[:, k : k + 1]), settings)
        after = next(iter(alone(data.test.x).values()))
        assert (after - before).abs().max() > 0.01
        torch.testing.assert_close(found[k], after.view_as(found[k]), rtol=1e-3, atol=1e-4)


# --- weights of the losses -----------------------------------------------------------------------


def test_si_does_not_see_the_scale_of_a_loss():
    update, losses = build(ScaleInvariant)
    gradients = []
    for scale in (1.0, 1e3):
        update.model.zero_grad()
        values = torch.stack(list(losses().values())) * torch.tensor([1.0, scale, 1.0, 1.0])
        update.objective(values).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in update.model.parameters()]))
    torch.testing.assert_close(*gradients)
    plain = torch.autograd.grad(sum(losses().values()), update.model.backbone[0].weight)[0]
    assert not torch.allclose(gradients[0][: plain.numel()], plain.flatten(), rtol=0.01)


def test_uw_is_stationary_at_the_log_losses():
    update, losses = build(UncertaintyWeighting)
    values = torch.stack(list(losses().values())).detach()
    update.log_variances.data = values.log()
    update.objective(values).backward()
    assert update.log_variances.grad.abs().max() < 1e-6
    update.log_variances.grad = None
    update.log_variances.data += torch.tensor([0.5, -0.5, 0.5, -0.5])
    update.objective(values).backward()
    assert (update.log_variances.grad * torch.tensor([1, -1, 1, -1]) > 0.1).all()
    start = update.log_variances.detach().clone()
    update.step(losses())
    assert (update.log_variances != start).all()  # the optimizer has them


def test_rlw_weights_vary_and_average_to_one():
    update, losses = build(RandomLossWeighting)
    values = torch.stack(list(losses().values()))
    drawn = []
    for _ in range(4000):
        objective = update.objective(values)
        drawn.append(update.task_weights())
        assert objective.item() == pytest.approx((drawn[-1] * values).sum().item(), rel=1e-5)
    drawn = torch.stack(drawn)
    assert (drawn > 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.full((4000,), 4.0))
    torch.testing.assert_close(drawn.mean(0), torch.ones(4), rtol=0, atol=0.06)
    assert (drawn.std(0) > 0.5).all()


def test_dwa_weights_follow_the_ratio_of_the_last_two_epochs():
    update, _ = build(DynamicWeightAverage, temperature=2.0)
    parameter = update.model.heads["regression"].bias[0]
    epochs = [[4.0, 2.0, 1.0, 1.0], [2.0, 2.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    for epoch in epochs:
        for offset in (-0.5, 0.0, 0.5):  # an epoch has three steps; means count
            losses = {t.name: v + offset + 0 * parameter for t, v in zip(TASKS, epoch, strict=True)}
            if epoch is epochs[1]:
                update.objective(torch.stack(list(losses.values())))
                torch.testing.assert_close(update.weights, torch.ones(4))
            update.step(losses)
            if epoch is epochs[2] and offset < 0.5:
                ratio = torch.tensor([0.5, 1.0, 3.0, 1.0])
                torch.testing.assert_close(update.weights, 4 * (ratio / 2).softmax(0))


def test_famo_steps_down_balanced_log_losses_and_learns_from_their_fall():
    update, losses = build(FAMO, rate=0.1, decay=0.0)
    update.logits.data = torch.tensor([0.3, -0.2, 0.5, 0.0])
    z = update.logits.softmax(0).detach()
    before = torch.stack(list(losses().values())).detach()
    weights = z / before
    weights *= 4 / weights.sum()
    expected = torch.autograd.grad(
        (weights * torch.stack(list(losses().values()))).sum(), update.model.backbone[0].weight
    )[0]
    update.step(losses())
    torch.testing.assert_close(update.model.backbone[0].weight.grad, expected)
    torch.testing.assert_close(update.task_weights(), weights)
    fall = torch.tensor([0.1, 0.4, 0.0, -0.2])
    names = [task.name for task in TASKS]
    update.after_step(lambda: dict(zip(names, before * (-fall).exp(), strict=True)))
    # Jacobian of the softmax: the weight of a task that fell less than the mean goes up.
    gradient = z * (fall - (z * fall).sum())
    torch.testing.assert_close(update.logits.grad, gradient, rtol=1e-3, atol=1e-6)
    moved = update.logits.detach() - torch.tensor([0.3, -0.2, 0.5, 0.0])
    assert (moved.sign() == -gradient.sign()).all()


def test_igbv2_rewards_the_task_that_improved_least():
    update, losses = build(ImprovableGapBalancing)
    first = [torch.stack(list(losses().values())).detach()]
    for _ in range(3):
        update.step(losses())
        first.append(torch.stack(list(losses().values())).detach())
    torch.testing.assert_close(update.base, torch.stack(first[:3]).mean(0))
    before, now = update.base * torch.tensor([1.0, 2.0, 3.0, 4.0]), update.base * 0.5
    assert update.reward(before, now).item() == pytest.approx(0.5)
    update.step(losses())
    state, action, reward, after = update.agent._memory[-1]
    torch.testing.assert_close(state, first[2])
    torch.testing.assert_close(after, first[3])
    torch.testing.assert_close(reward, ((first[2] - first[3]) / update.base).min())
    assert action.sum().item() == pytest.approx(4, rel=1e-5)


def test_igbv2_agent_learns_what_is_rewarded():
    agent = Agent(3, rate=3e-3, seed=0)
    state = torch.ones(3)

    def mean_action():
        with torch.no_grad():
            return agent.act(state.expand(500, 3))[0].mean(0)

    assert mean_action()[2] < 1.5
    for _ in range(300):
        with torch.no_grad():
            action, _ = agent.act(state)
        agent.remember(state, action, 5 * action[2], state)
    for _ in range(250):
        agent.learn()
    assert mean_action()[2] > 2
    torch.testing.assert_close(agent.act(state.expand(9, 3))[0].sum(1), torch.full((9,), 3.0))


# --- weights of the gradients --------------------------------------------------------------------


# Heads of DB-MTL receive gradients of log losses, those of NTKMTL-SR weighted ones.
@pytest.mark.parametrize("name", [n for n in GRADIENT if n not in ("db-mtl", "ntkmtl-sr")])
def test_shared_layers_get_the_weighted_sum_and_heads_their_own_gradient(name):
    method = CATALOGUE[name]
    update, losses = build(method.update, **method.settings)
    values = list(losses().values())
    shared = list(update.model.backbone.parameters())
    each = [torch.autograd.grad(value, shared, retain_graph=True) for value in values]
    heads = list(update.model.heads.parameters())
    own = torch.autograd.grad(sum(values), heads)
    torch.manual_seed(1)
    update.backward(losses())
    weights = update.task_weights()
    for k, parameter in enumerate(shared):
        expected = sum(w * gradients[k] for w, gradients in zip(weights, each, strict=True))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
    for parameter, expected in zip(heads, own, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("name", GRADIENT)
def test_gradients_task_by_task_are_those_of_one_pass(name, monkeypatch):
    method = CATALOGUE[name]
    update, losses = build(method.update, **method.settings)
    found = []
    for batched in (True, False):
        monkeypatch.setattr(GradientWeighting, "batched", batched)
        update.model.zero_grad()
        torch.manual_seed(1)  # PCGrad draws an order
        update.backward(losses())
        found.append(torch.cat([p.grad.flatten() for p in update.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


class Offsets(nn.Module):
    """A backbone that is the identity plus a parameter, so that both kinds of gradient agree."""

    def __init__(self, shape):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.offset


@pytest.mark.parametrize("name", ["mgda", "imtl-g", "aligned-mtl"])
def test_the_representation_version_is_the_plain_one_on_an_identity(name):
    x, y = torch.randn(20, 5), targets(20)
    model = TaskNet(Offsets((20, 5)), 5, TASKS)
    gradients = []
    for method in (CATALOGUE[name], CATALOGUE[f"{name}-ub"]):
        update = method.update(model, AT_ONCE, 3, **method.settings)
        assert update._representation == (method is not CATALOGUE[name])
        model.zero_grad()
        update.backward(criterion(TASKS)(model(x), y))
        gradients.append(model.backbone.offset.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_representation_version_differs_elsewhere():
    weights = []
    for name in ("mgda", "mgda-ub"):
        torch.manual_seed(0)
        update, losses = build(MGDA, **CATALOGUE[name].settings)
        update.backward(losses())
        weights.append(update.task_weights())
    assert (weights[0] - weights[1]).abs().max() > 0.01


def test_mgda_is_the_point_of_smallest_norm():
    update, _ = build(MGDA)
    for spread in (0.2, 0.5, 3.0):
        rows = scaled_rows(4, 30, spread)
        weights, mean = combination(update, rows)
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(4)
        point = mean / 4
        # The point of smallest norm is the one that no other point of the hull is behind.
        assert (rows @ point > (1 - 1e-6) * point @ point).all()


def test_mgda_of_normalised_gradients():
    update, _ = build(MGDA, normalize=True)
    rows = scaled_rows(4, 30, 3.0)
    weights, _ = combination(update, rows)
    assert weights.abs().sum().item() == pytest.approx(4)
    units = rows / rows.norm(dim=1, keepdim=True)
    shares = weights * rows.norm(dim=1)
    point = (shares / shares.sum()) @ units
    assert (units @ point > (1 - 1e-6) * point @ point).all()


def test_pcgrad_of_two_tasks_conflicts_with_neither():
    update, _ = build(PCGrad, regressions(2))
    rows = torch.tensor([[1.0, 0.0, 0.5], [-3.0, 1.0, 0.2]], dtype=torch.float64)
    assert (rows @ rows.sum(0) < 0).any()  # the plain sum does
    _, mean = combination(update, rows)
    assert (rows @ mean >= -1e-9).all()
    projected = [
        rows[k] - (rows[k] @ rows[1 - k]) / rows[1 - k].square().sum() * rows[1 - k] for k in (0, 1)
    ]
    torch.testing.assert_close(mean, projected[0] + projected[1])


def test_pcgrad_leaves_gradients_that_do_not_conflict():
    update, _ = build(PCGrad)
    rows = scaled_rows(4, 30).abs()
    weights, _ = combination(update, rows)
    torch.testing.assert_close(weights, torch.ones(4, dtype=torch.float64))


def test_cagrad_is_the_best_for_the_worst_off_within_its_ball():
    update, _ = build(CAGrad, c=0.4)
    for spread in (0.5, 1.0):
        rows = scaled_rows(4, 30, spread)
        _, total = combination(update, rows)
        found, mean = total / 4, rows.mean(0)
        radius = 0.4 * mean.norm()
        assert (found - mean).norm() <= radius * (1 + 1e-3)
        tries = torch.randn(2000, 4, dtype=torch.float64) @ rows
        others = mean + radius * tries / tries.norm(dim=1, keepdim=True)
        worst = (rows @ others.T).min(0).values.max()
        assert (rows @ found).min() >= worst - 1e-3 * worst.abs()


def test_imtlg_projections_are_equal():
    update, _ = build(IMTLG)
    rows = scaled_rows(4, 30, 2.0)
    weights, mean = combination(update, rows)
    assert weights.sum().item() == pytest.approx(4)
    projections = rows @ mean / rows.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(4))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_fairgrad_solves_its_equation(alpha, spread):
    rows = scaled_rows(11, 200, spread)
    rows[8:] = rows[7] + 1e-3 * rows[8:]  # nearly the same task four times
    gramian = rows @ rows.T / rows.square().sum(1).mean()
    w = fair_weights(gramian, alpha)
    assert (w > 0).all()
    torch.testing.assert_close(gramian @ w, w ** (-1 / alpha), rtol=1e-5, atol=0)
    update, _ = build(FairGrad, regressions(11), alpha=alpha)
    weights, _ = combination(update, rows)
    torch.testing.assert_close(weights, 11 * w / w.sum(), rtol=1e-4, atol=0)


def test_nash_mtl_is_the_bargaining_solution():
    method = CATALOGUE["nash-mtl"]
    update, _ = build(method.update, **method.settings)
    rows = scaled_rows(4, 30, 3.0)
    weights, mean = combination(update, rows)
    gains = weights * (rows @ mean)  # each task gains the same share
    torch.testing.assert_close(gains, gains.mean().expand(4))
    assert weights.sum().item() == pytest.approx(4)


def test_aligned_mtl_is_the_sum_of_orthogonal_gradients_of_one_length():
    update, _ = build(AlignedMTL)
    rows = scaled_rows(4, 30, 2.0)
    weights, mean = combination(update, rows)
    # The matrix with the rows' singular vectors and singular values of one: condition number one.
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    expected = (left @ right).sum(0)
    cosine = expected @ mean / expected.norm() / mean.norm()
    assert cosine.item() == pytest.approx(1, abs=1e-9)
    assert weights.abs().sum().item() == pytest.approx(4)


def test_a_gradient_of_zero_gives_equal_weights():
    update, _ = build(FairGrad)
    torch.testing.assert_close(update._weigh(torch.zeros(4, 30)), torch.ones(4))


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
    memory = {"memory-5": 25, "memory-20": 100, "memory-40": 200}  # heads have 5 weights
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
    gram = h.T @ h + torch.eye(5, dtype=torch.float64)
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
            plain.log_variances.data.copy_(update._base.log_variances.data)
            plain.log_variances.grad = None
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
        assert (update._base.log_variances != 0).all()


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

"""Each compared method by what defines it, so that a baseline that is silently wrong is caught."""

import copy

import pytest
import torch
from torch import nn

from examples.comparison.gap import Agent, ImprovableGapBalancing
from examples.comparison.networks import SeparateNets, mlp, single_task
from examples.comparison.tasks import by_task, criterion
from examples.comparison.weighting import (
    FAMO,
    DynamicWeightAverage,
    RandomLossWeighting,
    UncertaintyWeighting,
)
from examples.methods import LinearScalarization, ScaleInvariant
from examples.training import TrainSettings, train
from tests.examples.small import ALL, TASKS, build, made_up, targets


@pytest.fixture(scope="module")
def data():
    return made_up(TASKS, [80, 20, 20])


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
    norms = [nn.utils.get_total_norm(p.grad for p in n.parameters()) for n in model.networks]
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
    update.scalarizer.log_var.data = values.log()
    update.objective(values).backward()
    assert update.scalarizer.log_var.grad.abs().max() < 1e-6
    update.scalarizer.log_var.grad = None
    update.scalarizer.log_var.data += torch.tensor([0.5, -0.5, 0.5, -0.5])
    update.objective(values).backward()
    assert (update.scalarizer.log_var.grad * torch.tensor([1, -1, 1, -1]) > 0.1).all()
    start = update.scalarizer.log_var.detach().clone()
    update.step(losses())
    assert (update.scalarizer.log_var != start).all()  # the optimizer has them


def test_rlw_weights_vary_and_average_to_one():
    update, losses = build(RandomLossWeighting)
    values = torch.stack(list(losses().values()))
    drawn = []
    for _ in range(1500):
        objective = update.objective(values)
        drawn.append(update.task_weights())
        assert objective.item() == pytest.approx((drawn[-1] * values).sum().item(), rel=1e-5)
    drawn = torch.stack(drawn)
    assert (drawn > 0).all()
    torch.testing.assert_close(drawn.sum(1), torch.full((1500,), 4.0))
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
    update.scalarizer._w.data = torch.tensor([0.3, -0.2, 0.5, 0.0])
    z = update.scalarizer._w.softmax(0).detach()
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
    logits = update.scalarizer._w
    seen = update.scalarizer._optimizer.state[logits]["exp_avg"] / 0.1  # Adam's first step
    torch.testing.assert_close(seen, gradient, rtol=1e-3, atol=1e-6)
    moved = logits.detach() - torch.tensor([0.3, -0.2, 0.5, 0.0])
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
    for _ in range(80):
        agent.learn()
    assert mean_action()[2] > 2
    torch.testing.assert_close(agent.act(state.expand(9, 3))[0].sum(1), torch.full((9,), 3.0))

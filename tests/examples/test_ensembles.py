"""Deep ensembles: linear scalarization of every member, and the mean of their predictions."""

import copy

import pytest
import torch
from torch import nn

from examples import compare
from examples.comparison.catalogue import more_methods
from examples.comparison.ensembles import (
    EnsembleHead,
    HeadEnsemble,
    NetworkEnsemble,
    mean_prediction,
    per_member,
)
from examples.comparison.networks import mlp
from examples.comparison.tasks import by_task, criterion
from examples.methods import LinearScalarization
from examples.training import TrainSettings
from tests.examples.small import TASKS, compared, targets

ENSEMBLES = {n: m for n, m in more_methods("qm9").items() if n.startswith("ensemble")}

SETTINGS = TrainSettings(learning_rate=0.01, weight_decay=0.1, clip_norm=0.5, warmup_steps=3)
LOSSES = criterion(TASKS)


def make():
    return mlp(5, (6, 4), TASKS)


def batch():
    return torch.randn(20, 5), targets(20)


def member(model, which):
    """One member of an ensemble of heads as a network of its own, sharing no memory with it."""
    alone = make()
    alone.backbone.load_state_dict(model.backbone.state_dict())
    for name, head in alone.heads.items():
        many, rows = model.heads[name], slice(which * head.out_features, None)
        with torch.no_grad():
            head.weight.copy_(many.weight[rows][: head.out_features])
            head.bias.copy_(many.bias[rows][: head.out_features])
    return alone


def train(update, losses, data, steps=5):
    for _ in range(steps):
        x, y = data
        update.step(losses(update.model(x), y))


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradients(model, data):
    x, y = data
    model.zero_grad()
    sum(LOSSES(model(x), y).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# --- heads ---------------------------------------------------------------------------------------


def test_the_backbone_gets_the_mean_of_the_members_gradients_and_each_head_its_own():
    data, members = batch(), 3
    model = HeadEnsemble.network(make, members)
    assert not torch.allclose(*model.heads["c0"].weight.detach().split(3)[:2])
    each = [gradients(member(model, m), data) for m in range(members)]
    update = HeadEnsemble(model, TrainSettings(learning_rate=1e-9), 3, members=members)
    train(update, per_member(LOSSES), data, steps=1)
    for name, parameter in model.named_parameters():
        own = [g[name] for g in each]
        expected = torch.stack(own).mean(0) if name.startswith("backbone") else torch.cat(own)
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(
    ("members", "settings"),
    [(1, SETTINGS), (4, TrainSettings(learning_rate=0.01, weight_decay=0.1))],
    ids=["one, clipped", "four"],
)
def test_equal_heads_train_as_linear_scalarization_of_one(members, settings):
    data, alone = batch(), make()
    model = HeadEnsemble.network(lambda: copy.deepcopy(alone), members)
    for head in model.heads.values():
        with torch.no_grad():
            head.weight.copy_(head.weight[: len(head.weight) // members].repeat(members, 1))
            head.bias.copy_(head.bias[: len(head.bias) // members].repeat(members))
    train(HeadEnsemble(model, settings, 3, members=members), per_member(LOSSES), data)
    train(LinearScalarization(alone, settings, 3), LOSSES, data)
    for m in range(members):
        trained = flat(member(model, m).parameters())
        torch.testing.assert_close(trained, flat(alone.parameters()), rtol=1e-4, atol=1e-6)


def test_a_network_whose_head_cannot_be_multiplied_is_refused():
    class Hidden(nn.Module):
        groups = (make().groups[0],)

    with pytest.raises(ValueError, match="none of its linear modules"):
        HeadEnsemble.network(Hidden, 2)


# --- networks ------------------------------------------------------------------------------------


def test_every_network_trains_as_if_it_were_alone():
    data, members = batch(), 3
    model = NetworkEnsemble.network(make, members)
    alone = [copy.deepcopy(network) for network in model.networks]
    train(NetworkEnsemble(model, SETTINGS, 3, members=members), per_member(LOSSES), data)
    for network, other in zip(model.networks, alone, strict=True):
        before = flat(other.parameters())
        train(LinearScalarization(other, SETTINGS, 3), LOSSES, data)
        assert (flat(other.parameters()) - before).norm() > 0.05
        torch.testing.assert_close(
            flat(network.parameters()), flat(other.parameters()), rtol=1e-4, atol=1e-6
        )
    first, second = (flat(n.parameters()) for n in model.networks[:2])
    assert not torch.allclose(first, second, atol=0.01)


# --- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ENSEMBLES)
def test_a_prediction_is_the_mean_over_the_members(method):
    x, members = batch()[0], 3
    model = ENSEMBLES[method].update.network(make, members)
    if method == "ensemble-heads":
        alone = [member(model, m) for m in range(members)]
    else:
        alone = list(model.networks)
    outputs = [network(x) for network in alone]
    together = by_task(TASKS, model.eval()(x))
    each = [by_task(TASKS, o) for o in outputs]
    to_prediction = {
        "regression": lambda z: z,
        "binary": torch.sigmoid,
        "multiclass": lambda z: z.softmax(-1),
    }
    for k, task in enumerate(TASKS):
        predict = to_prediction[task.kind]
        expected = torch.stack([predict(e[k]) for e in each]).mean(0)
        torch.testing.assert_close(predict(together[k]), expected)


def test_a_mean_prediction_of_certain_members_is_finite():
    logits = torch.tensor([[[200.0, -200.0]], [[200.0, 200.0]]])
    torch.testing.assert_close(
        mean_prediction(logits, "binary"), torch.tensor([[200.0, 0.0]]), rtol=0.01, atol=1e-5
    )
    torch.testing.assert_close(
        mean_prediction(logits, "multiclass").softmax(-1), torch.tensor([[0.75, 0.25]])
    )


# --- in a comparison -----------------------------------------------------------------------------


def test_ensembles_are_compared_where_they_are_named(tmp_path):
    arms = [
        *("--arm", "heads", '{"method": "ensemble-heads", "members": 1}'),
        *("--arm", "networks", '{"method": "ensemble-networks", "members": 1}'),
    ]
    arguments = ["nhefs", "--epochs", "2", "--train-size", "120", "--seeds", "1"]
    content = compared(tmp_path, *arguments, "--methods", "ls", *arms)
    runs = {name: content["runs"][name][0] for name in ("ls", "heads", "networks")}
    assert runs["heads"]["identity"]["settings"] == {"members": 1}
    for name in ("heads", "networks"):
        for found, expected in zip(runs[name]["test"], runs["ls"]["test"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)

    arguments += ["--output", str(tmp_path)]
    assert not compare.parse_arguments(arguments).plan.methods.keys() & ENSEMBLES.keys()
    plan = compare.parse_arguments([*arguments, "--methods", "all", *ENSEMBLES]).plan
    assert list(plan.methods)[-2:] == ["ensemble-heads", "ensemble-networks"]
    assert [m.settings for m in ENSEMBLES.values()] == [{"members": 1024}, {"members": 10}]
    assert isinstance(ENSEMBLES["ensemble-heads"].network(make).heads["regression"], EnsembleHead)

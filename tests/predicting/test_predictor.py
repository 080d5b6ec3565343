"""The predictor as a module: after training under either rule, saved, moved, exported, dense."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, BinaryHead, LikelihoodRule, MulticlassHead, RegressionHead
from bayesagg.moments.nodes import standard_normal_nodes
from bayesagg.predicting import Predictor
from bayesagg.rules import settings
from tests.helpers.data import losses_over, make_batch, without
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import EPOCH
from tests.helpers.states import assert_same, snapshot
from tests.helpers.training import train, wrap
from tests.predicting.cases import heads_of, loader

STEPS = 2 * EPOCH + 2


def trained(rule, net=None, steps=STEPS, **kwargs):
    net = plain_net() if net is None else net
    optimizer = wrap(net, rule=rule, **kwargs)
    train(net, optimizer, steps)
    return net, optimizer


# --- after training ------------------------------------------------------------------------------


def test_the_mean_of_a_regression_is_what_the_network_says(rule):
    net, optimizer = trained(rule)
    x = make_batch(seed=9)[0]
    found = optimizer.predictor(net)(x)
    torch.testing.assert_close(found["reg"].mean, net(x)["reg"])
    torch.testing.assert_close(found["cls"].output.softmax(1), net(x)["cls"].softmax(1))
    assert repr(found["reg"]) == f"RegressionPrediction(shape={tuple(net(x)['reg'].shape)})"


def test_weights_that_were_restored_alone(rule):
    """The mean is what the network says; that the rest is of other features is announced."""
    net, optimizer = trained(rule, steps=EPOCH + 2)
    weights, state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    with torch.no_grad():
        net.trunk[0].weight.mul_(-1)  # other features, as after more training
    train(net, optimizer, range(20, 20 + 2 * EPOCH))
    net.load_state_dict(weights)
    with pytest.warns(UserWarning, match=r"optimizer's state.*pass data") as told:
        predictor = optimizer.predictor(net)
    assert "'reg'" in str(told[0].message)
    assert {warning.filename for warning in told} == {__file__}
    x = make_batch(seed=9)[0]
    torch.testing.assert_close(predictor(x)["reg"].mean, net(x)["reg"])
    optimizer.predictor(net, loader())  # says nothing, and neither does a state that fits
    optimizer.load_state_dict(state)
    optimizer.predictor(net)


@pytest.mark.parametrize("exact", [False, True])
def test_a_predictor_of_a_network_that_was_trained_further(exact, rule, tmp_path):
    """Is out of date, which it says once; a copy, a loaded one and weights put back are not."""
    net, optimizer = trained(rule, steps=EPOCH + 2)
    predictor = optimizer.predictor(net, loader() if exact else None)
    x, weights = make_batch(seed=9)[0], copy.deepcopy(net.state_dict())
    copied = copy.deepcopy(predictor)
    torch.save(predictor.state_dict(), tmp_path / "predictor.pt")
    net.load_state_dict({name: 2 * value for name, value in weights.items()})  # an average
    net.load_state_dict(weights)
    expected = predictor(x)["reg"].stddev

    train(net, optimizer, range(20, 20 + EPOCH))
    with pytest.warns(UserWarning, match=r"have changed since.*anew") as told:
        predictor(x)
    assert {warning.filename for warning in told} == {__file__}
    predictor(x)
    assert torch.equal(copied(x)["reg"].stddev, expected)
    predictor.load_state_dict(torch.load(tmp_path / "predictor.pt", weights_only=True))
    torch.testing.assert_close(predictor(x)["reg"].stddev, expected)
    train(net, optimizer, range(20, 20 + EPOCH))
    with pytest.warns(UserWarning, match="have changed since"):
        predictor(x)


@pytest.mark.parametrize("lag", [None, 50])
def test_predictions_have_the_noise_of_the_latest_steps(lag, monkeypatch):
    """The default rule's only; not of the steps that tasks are weighed by, unless a lag is set."""
    monkeypatch.setattr(settings, "_RECENT", 2)
    torch.manual_seed(0)
    net = nn.Linear(3, 1).double()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    rule = LikelihoodRule(warmup=0, lag=lag)
    optimizer = BayesAggWrapper(base, net, {"y": RegressionHead(net)}, rule=rule)
    for step in range(200):  # noise of one standard deviation, then of 0.01
        h = torch.randn(64, 3).double()
        y = h.sum(1, keepdim=True) + (1 if step < 100 else 0.01) * torch.randn(64, 1)
        optimizer.step({"y": F.mse_loss(net(h), y)})
    [noise] = dict(optimizer.predictor(net)._named())["y"].noise
    assert noise < 3e-4 if lag is None else noise > 0.05


def test_evidence_of_training_is_what_the_memory_holds():
    net, optimizer = trained("likelihood")
    memory, dof = optimizer.engine._memory, optimizer.engine.rule.degrees_of_freedom
    g = torch.cat([net.trunk(make_batch(seed=9)[0]), torch.ones(6, 1).double()], 1).detach()
    p = optimizer.predictor(net)(make_batch(seed=9)[0])
    [unit] = memory.units
    total, level, weight = unit.scale[0, :3]  # predictions have the recent noise
    eye = torch.eye(5).double()
    for k in range(2):
        tau2, unit_of = total[k] / weight[k], level[k] / weight[k]
        a = unit.gram[0] + tau2 / (0.05 * unit_of) * eye
        variance = tau2 * ((g @ torch.linalg.inv(a)) * g).sum(1)
        squared = p["reg"].scale.square()[:, k]
        torch.testing.assert_close(squared, tau2 + variance)
        assert p["reg"].dof[k] == dof
    bound = torch.linalg.inv(unit.gram[0] / 4 + eye / 0.05)
    torch.testing.assert_close(p["bin"].output_variance[:, 1], ((g @ bound) * g).sum(1))
    bound = torch.linalg.inv(unit.gram[0] / 2 + eye / 0.05)
    torch.testing.assert_close(p["cls"].output_variance[:, 1], ((g @ bound) * g).sum(1))


def test_the_papers_posterior_is_that_of_the_last_epoch():
    net, optimizer = trained("paper")
    memory = optimizer.engine._memory
    g = torch.cat([net.trunk(make_batch(seed=9)[0]), torch.ones(6, 1).double()], 1).detach()
    p = optimizer.predictor(net)(make_batch(seed=9)[0])
    for group, state in zip(memory.groups, memory.states, strict=True):
        posterior = group.posterior(state.full, None)
        [name] = group.heads
        if name == "reg":
            v = ((g @ posterior.covariance[0]) * g).sum(1)[:, None]
            torch.testing.assert_close(p["reg"].epistemic, v.expand(-1, 2))
            torch.testing.assert_close(p["reg"].aleatoric, torch.ones(6, 2).double())
        elif name == "bin":
            v = torch.stack([((g @ c) * g).sum(1) for c in posterior.covariance], 1)
            torch.testing.assert_close(p["bin"].output_variance, v)
        else:
            from bayesagg.posterior import contrast_basis

            basis = contrast_basis(3, g)
            s = posterior.covariance[0].view(2, 5, 2, 5)
            v = torch.einsum("ec,nd,edfg,ng,fc->nc", basis, g, s, g, basis)
            torch.testing.assert_close(p["cls"].output_variance, v)


def test_missing_labels_and_learned_noise(rule):
    net = plain_net()
    optimizer = wrap(net, rule=rule, settings={"reg": {"noise_variance": "learned"}})
    for i in range(STEPS):
        x, labels = make_batch(seed=i, size=20)
        for name, y in labels.items():
            labels = without(labels, name, torch.rand(y.shape) < 0.2)
        optimizer.zero_grad()
        optimizer.step(losses_over(net(x), labels))
    p = optimizer.predictor(net)(make_batch(seed=9)[0])["reg"]
    assert isinstance(p.distribution, torch.distributions.StudentT)
    assert (p.epistemic > 0).all() and not torch.allclose(p.epistemic[:, 0], p.epistemic[:, 1])


def test_exact_under_either_rule_is_its_prior_and_the_data(rule):
    net, optimizer = trained(rule)
    data = loader()
    exact = optimizer.predictor(net, data)
    x = make_batch(seed=9)[0]
    gamma = {"likelihood": 0.05, "paper": 1.0}[rule]
    for task in ("bin", "cls"):
        plain = Predictor.fit(net, heads_of(net), data, prior_variance=gamma)
        torch.testing.assert_close(exact(x)[task].mean, plain(x)[task].mean)
    if rule == "likelihood":  # in units of the labels
        scaled = [(x, {**y, "reg": 1000 * y["reg"]}) for x, y in data]
        again = optimizer.predictor(net, scaled)
        torch.testing.assert_close(again(x)["reg"].stddev, 1000 * exact(x)["reg"].stddev)


def test_towers_and_a_loss_without_a_head():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
            self.a = nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))
            self.b = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))

        def forward(self, x, shift=0.0):
            h = self.trunk(x + shift)
            return {"a": self.a(h), "b": self.b(h)}

    net = Towers().double()
    heads = {"a": RegressionHead(net.a), "b": MulticlassHead(net.b)}
    optimizer = BayesAggWrapper(torch.optim.Adam(net.parameters()), None, heads)
    x, y = torch.randn(40, 5).double(), torch.randint(2, (40,))
    for _ in range(60):
        out = net(x)
        optimizer.zero_grad()
        losses = {"a": F.mse_loss(out["a"], x[:, :1]), "b": F.cross_entropy(out["b"], y)}
        optimizer.step(losses)
    predictor = optimizer.predictor(net)
    torch.testing.assert_close(predictor(x)["a"].mean, net(x)["a"])
    labels = {"a": x[:, :1], "b": y}
    tuples = optimizer.predictor(net, [((x, 0.5), labels)])
    keywords = optimizer.predictor(net, [({"x": x, "shift": 0.5}, labels)])
    for p in (tuples(x), keywords(x=x)):
        assert p["b"].mean.shape == (40, 2) and p["a"].stddev.shape == (40, 1)
    assert torch.equal(tuples(x)["a"].mean, keywords(x)["a"].mean)


# --- a module ------------------------------------------------------------------------------------


def test_nothing_is_left_behind(rule):
    net, optimizer = trained(rule, make_net())  # batch normalisation has buffers
    net.trunk.train()
    net.heads.eval()
    before = snapshot(net, optimizer)
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    predictor = optimizer.predictor(net, loader())
    predictor.calibrate(loader())
    for p in predictor(make_batch(seed=9)[0]).values():
        assert not p.mean.requires_grad and not p.stddev.requires_grad
    assert_same(before, snapshot(net, optimizer))
    assert hooks == [len(m._forward_pre_hooks) for m in net.modules()]
    assert predictor(make_batch(seed=9, size=1)[0])["reg"].mean.shape == (1, 2)


def test_gradients_when_asked_for():
    net, optimizer = trained("likelihood")
    x = make_batch(seed=9)[0].requires_grad_()
    predictor = optimizer.predictor(net)
    p = predictor(x, differentiable=True)
    total = sum(q.mean.sum() + q.stddev.sum() + q.epistemic.sum() for q in p.values())
    [gradient] = torch.autograd.grad(total, x)
    assert gradient.isfinite().all()

    def stddev(x):
        return predictor(x, differentiable=True)["reg"].stddev

    assert torch.autograd.gradcheck(stddev, x[:2])


@pytest.mark.parametrize("exact", [False, True])
def test_a_saved_predictor_needs_neither_engine_nor_data(rule, exact, tmp_path):
    net, optimizer = trained(rule)
    predictor = optimizer.predictor(net, loader() if exact else None).calibrate(loader())
    x = make_batch(seed=9)[0]
    torch.save(predictor.state_dict(), tmp_path / "predictor.pt")
    other = plain_net(seed=5)
    again = Predictor(other, heads_of(other))
    again.load_state_dict(torch.load(tmp_path / "predictor.pt", weights_only=True))
    torch.save(predictor, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    for task, p in predictor(x).items():
        for q in (again(x)[task], whole(x)[task]):
            assert torch.equal(p.mean, q.mean) and torch.equal(p.stddev, q.stddev)
            assert torch.equal(p.epistemic, q.epistemic)
    copied = copy.deepcopy(predictor)
    assert torch.equal(copied(x)["cls"].mean, predictor(x)["cls"].mean)
    assert copied.model is not predictor.model
    single = copied.float()(x.float())["reg"].stddev
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), predictor(x)["reg"].stddev, rtol=1e-4, atol=1e-5)


def test_the_device_is_that_of_the_module():
    net = plain_net()
    predictor = Predictor.fit(net, heads_of(net), loader()).to("meta")
    assert {b.device.type for b in predictor.buffers()} == {"meta"}


@pytest.mark.filterwarnings("ignore")  # torch's own exporter warns of its parts
@pytest.mark.parametrize(
    ("rule", "source"),
    [("likelihood", "of training"), ("paper", "of training"), ("paper", "calibrated fit")],
)
def test_an_exported_graph_gives_mean_and_standard_deviation(source, rule):
    """Of a network that an engine watches too, and before anything was predicted with it."""
    net, optimizer = trained(rule)
    predictor = optimizer.predictor(net)
    if source == "calibrated fit":
        predictor = Predictor.fit(net, heads_of(net), loader()).calibrate(loader())
    standard_normal_nodes.cache_clear()
    x = make_batch(seed=9, size=7)[0]
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(predictor.exportable(), (x,), dynamic_shapes=(({0: batch},),))
    for inputs in (x, make_batch(seed=8, size=40)[0]):
        found = program.module()(inputs)
        for task, p in predictor(inputs).items():
            torch.testing.assert_close(found[task][0], p.mean, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found[task][1], p.stddev, rtol=1e-5, atol=1e-7)


PARTS = ("mean", "stddev", "epistemic", "aleatoric", "output", "output_variance")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (RegressionHead, {}),
        (BinaryHead, {}),  # with eigenvectors of their own
        (BinaryHead, {"max_parameters": 1, "passes": 200}),  # with those of one Gram matrix
    ],
    ids=["regression", "binary", "binary beyond the size"],
)
def test_heads_on_one_tensor_are_as_each_alone(kind, given, tmp_path):
    """Also where they are saved, copied or moved; regressions share what they have in common."""
    net = plain_net(outputs={"one": 1, "two": 2})
    heads = {n: kind(m) for n, m in net.heads.items()}
    data = []
    for x, _ in loader():
        y = x if kind is RegressionHead else (x > 0).double()
        data.append((x, {"one": y[:, :1], "two": y[:, 1:3]}))
    predictor, x = Predictor.fit(net, heads, data, **given), make_batch(seed=9)[0]
    torch.save(predictor.state_dict(), tmp_path / "predictor.pt")
    loaded = Predictor(net, heads)
    loaded.load_state_dict(torch.load(tmp_path / "predictor.pt", weights_only=True))
    for one in (predictor, loaded, copy.deepcopy(predictor), predictor.to("cpu", torch.float64)):
        shared = {id(posterior.vectors) for posterior in one.posteriors}
        assert len(shared) == 1 or kind is BinaryHead
        for name, together in one(x).items():
            some = [(x, {name: y[name]}) for x, y in data]
            alone = Predictor.fit(net, {name: heads[name]}, some, **given)(x)[name]
            for part in PARTS:
                torch.testing.assert_close(getattr(together, part), getattr(alone, part))
            if kind is BinaryHead:
                logits = together.distribution.logits, alone.distribution.logits
                torch.testing.assert_close(*logits)
            torch.testing.assert_close(together.interval(), alone.interval())


def test_the_network_runs_once_over_batches_of_any_size():
    net = plain_net()
    whole, runs = loader(batches=1, size=200), []
    handle = net.trunk.register_forward_hook(lambda *_: runs.append(1))
    sizes = (1, 60, 139)
    x, y = whole[0]
    parts = zip(x.split(sizes), *(v.split(sizes) for v in y.values()), strict=True)
    data = [(first, dict(zip(y, rest, strict=True))) for first, *rest in parts]
    found = Predictor.fit(net, heads_of(net), data)
    handle.remove()
    assert len(runs) == len(sizes)
    expected = Predictor.fit(net, heads_of(net), whole)
    new = make_batch(seed=9)[0]
    for task, p in found(new).items():
        torch.testing.assert_close(p.stddev, expected(new)[task].stddev)

"""The wrapper is an optimizer like any other; more in the other files of this name."""

import copy

import pytest
import torch

from bayesagg import BayesAgg
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, OPTIMIZERS, PHASES, QUICK
from tests.helpers.states import assert_same, difference, gradients, snapshot
from tests.helpers.training import train, train_step, wrap

BASES = sorted(OPTIMIZERS)


# --- the class -----------------------------------------------------------------------------------


def test_it_is_an_optimizer_and_says_what_it_wraps(rule, net):
    optimizer = wrap(net, "adamw", rule)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for part in ("BayesAggWrapper", "AdamW", "regression 4 -> 2", "multiclass 4 -> 3", "lr: 0.01"):
        assert part in repr(optimizer)
    assert isinstance(optimizer.engine, BayesAgg)
    assert optimizer.task_weights is optimizer.engine.task_weights
    assert set(optimizer.task_weights) == {"reg", "bin", "cls"}


@pytest.mark.filterwarnings("ignore:.*LBFGS")  # heads that the posterior sets
@pytest.mark.parametrize("base", BASES)
def test_groups_state_and_defaults_are_those_of_the_base(base, rule, net):
    """Live objects, before and after everything that replaces them."""
    optimizer = wrap(net, base, rule, settings=QUICK)

    def same():
        inner = optimizer.base_optimizer
        return (
            optimizer.param_groups is inner.param_groups
            and optimizer.state is inner.state
            and optimizer.defaults is inner.defaults
        )

    assert same()
    train(net, optimizer, 2, closure=base == "lbfgs")
    assert same()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same()
    optimizer.param_groups[0]["lr"] = 0.125
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.125
    optimizer.base_optimizer.load_state_dict(optimizer.base_optimizer.state_dict())
    assert same()
    assert len(optimizer.state) == len(optimizer.base_optimizer.state) > 0 or base == "sgd"


def test_assigned_groups_state_and_defaults_reach_the_base(rule, net):
    """As checkpoint libraries assign them."""
    optimizer = wrap(net, "adam", rule)
    groups, defaults = list(optimizer.param_groups), dict(optimizer.defaults)
    optimizer.param_groups, optimizer.defaults = groups, defaults
    optimizer.state = state = type(optimizer.state)(dict)
    base = optimizer.base_optimizer
    assert base.param_groups is groups and base.defaults is defaults and base.state is state


def test_add_param_group_reaches_the_base_and_trains(rule, net, batch):
    """Heads added to the base later, as a head that is unfrozen."""
    base = torch.optim.SGD(net.trunk.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="task '(reg|bin|cls)': the optimizer does not have"):
        optimizer = wrap(net, base, rule)
    assert len(base.param_groups) == 1
    optimizer.add_param_group({"params": list(net.heads.parameters()), "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.5]
    before = net.heads["cls"].weight.detach().clone()
    train_step(net, optimizer, batch)
    torch.testing.assert_close(
        net.heads["cls"].weight, before - 0.5 * net.heads["cls"].weight.grad, rtol=0, atol=0
    )


# --- zero_grad, step, closures -------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@PHASES
def test_zero_grad(set_to_none, steps, rule, net, batch):
    """Gradients vanish as asked, and nothing else: what was learned stays."""
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, steps)
    x, labels = batch
    optimizer.backward(make_losses(net(x), labels))
    before = snapshot(net, optimizer)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in net.trunk.parameters():
        assert p.grad is None if set_to_none else not p.grad.any()
    assert_same(before, snapshot(net, optimizer), ignore=["gradients"])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients_do_not_decay_posterior_heads(set_to_none, rule, net, device, dtype):
    """A gradient of zeros would let weight decay and momentum move the head."""
    optimizer = wrap(net, "momentum", rule, settings=QUICK)
    train(net, optimizer, EPOCH)
    head = net.heads["reg"]
    for index in (3, 4):
        x, labels = make_batch(device, dtype, seed=index)
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.backward(make_losses(net(x), labels))
        before = [p.detach().clone() for p in head.parameters()]
        optimizer.step()
        for old, new in zip(before, head.parameters(), strict=True):
            torch.testing.assert_close(new.detach(), old, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["sgd", "adamw"])  # without a state and with one
@pytest.mark.parametrize(
    "form", ["backward", "loss", "closure", "keyword", "targets", "empty", "sum", "none"]
)
def test_all_forms_of_a_step_agree(form, base, rule, like):
    """``step(losses)``, ``backward`` or ``loss`` and ``step()``, ``step(closure)`` either way.

    A sum is a number of labels times the mean; unreduced losses are averaged.
    """
    nets = [plain_net(*like) for _ in range(2)]
    one, other = (wrap(net, base, rule, settings=QUICK) for net in nets)
    for index in range(7):
        train_step(nets[0], one, index)
        x, labels = make_batch(*like, seed=index)

        def closure(x=x, labels=labels):
            other.zero_grad()
            return other.backward(make_losses(nets[1](x), labels))

        if form in ("closure", "keyword"):
            result = other.step(closure) if form == "closure" else other.step(closure=closure)
            assert not result.requires_grad and result.dim() == 0
            continue
        other.zero_grad()
        losses = make_losses(nets[1](x), labels, form if form in ("sum", "none") else "mean")
        if form == "sum":
            losses = {name: loss / labels[name].numel() for name, loss in losses.items()}
        if form == "backward":
            result = other.backward(losses)
            assert other.step() is None
        elif form == "loss":
            result = other.loss(losses)
            result.backward()
            result = result.detach()
            assert other.step() is None
        else:
            given = {"reg": labels["reg"]} if form == "targets" else {}
            result = other.step(losses, targets=given)
        assert result == sum(loss.mean() for loss in losses.values())
        assert not result.requires_grad and result.dim() == 0
    ours, theirs = snapshot(nets[0], one), snapshot(nets[1], other)
    if form in ("targets", "sum", "none"):  # labels are rounded otherwise
        torch.testing.assert_close(ours["parameters"], theirs["parameters"])
    else:
        assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*LBFGS")  # heads that the posterior sets
def test_an_optimizer_that_needs_a_closure(rule, net, batch):
    """Without one the error says how; with one: ``loops/test_optimizers.py``."""
    optimizer = wrap(net, "lbfgs", rule)
    x, labels = batch
    losses = make_losses(net(x), labels)
    before = snapshot(net, optimizer)
    for arguments in ((), (losses,)):
        with pytest.raises(TypeError, match=r"closure.*optimizer\.step\(closure\)"):
            optimizer.step(*arguments)
    assert_same(before, snapshot(net, optimizer))


def test_a_closure_without_gradients_is_given_some(rule, net, batch):
    """As any optimizer does, the base enables gradients around its closure."""
    optimizer = wrap(net, "sgd", rule)
    x, labels = batch

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return optimizer.backward(make_losses(net(x), labels))

    before = net.trunk[0].weight.detach().clone()
    with torch.no_grad():
        optimizer.step(closure)
    assert not torch.equal(before, net.trunk[0].weight)


def test_a_step_without_anything_new_teaches_nothing(rule, net, batch):
    """``step()`` alone is the base's step: no evidence, no end of an epoch."""
    optimizer = wrap(net, rule=rule)
    train_step(net, optimizer, batch)
    before = optimizer.state_dict()["bayesagg"]
    for _ in range(EPOCH):
        optimizer.step()
        optimizer.step(closure=None)
    assert difference(before, optimizer.state_dict()["bayesagg"]) is None


# --- who sets the heads --------------------------------------------------------------------------


def test_gradient_heads_are_trained_by_ordinary_gradients(rule, net, batch):
    """Exact: the gradient at h changes nothing at the heads."""
    settings = {name: {"readout": "gradient"} for name in ("reg", "bin", "cls")}
    optimizer = wrap(net, "sgd", rule, settings=settings)
    train(net, optimizer, 4)
    x, labels = batch
    optimizer.zero_grad()
    sum(make_losses(net(x), labels).values()).backward()
    plain = gradients(net)
    optimizer.zero_grad()
    optimizer.backward(make_losses(net(x), labels))
    ours = gradients(net)
    for name in plain:
        if name.startswith("heads"):
            torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=0)
        elif name == "trunk.0.weight":
            assert not torch.allclose(ours[name], plain[name])
    before = snapshot(net)["parameters"]
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.05 * p.grad)


def test_step_refuses_what_it_cannot_do(rule, net, batch):
    optimizer = wrap(net, rule=rule)
    x, labels = batch
    losses = make_losses(net(x), labels)
    before = snapshot(net, optimizer)
    for args, kwargs in (
        ((losses,), {"closure": lambda: None}),
        ((lambda: None,), {"closure": lambda: None}),
        ((), {"targets": labels}),
    ):
        with pytest.raises(TypeError, match=r"step\(\)"):
            optimizer.step(*args, **kwargs)
    assert_same(before, snapshot(net, optimizer))
    optimizer.step(losses)  # which can still be used

"""The wrapper is an optimizer like any other: schedulers, checkpoints, hooks, copies, scalers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from bayesagg import BayesAgg, BayesAggWrapper
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import EPOCH, OPTIMIZERS, PHASES, QUICK, RULES, SAMPLED
from tests.helpers.states import (
    assert_finite,
    assert_same,
    difference,
    gradients,
    snapshot,
    tensors_of,
)
from tests.helpers.training import make_heads, train, train_step, wrap

BASES = sorted(OPTIMIZERS)
PLAIN_BASES = [name for name in BASES if name != "lbfgs"]  # those that need no closure
SETTINGS = {
    "default": {},
    "learned_noise": {"reg": {"noise_variance": "learned"}},
    "monte_carlo": SAMPLED,
    "posterior_readout": {name: {"readout": "posterior"} for name in ("reg", "bin", "cls")},
    "gradient_readout": {"reg": {"readout": "gradient"}},
}
ARGUMENTS = {
    "paper": [
        {"covariance": "full"},
        {"gradient_scale": "mean"},
        {"pretrain_epochs": 0},
        {"pretrain_epochs": 2},
        {"max_data": 4},
        {"steps_per_epoch": None},
    ],
    "likelihood": [{"memory": 5}, {"warmup": 0}, {"keep_length": False}],
}


@pytest.fixture
def net(device, dtype):
    return make_net(device, dtype)


@pytest.fixture
def batch(device, dtype):
    return make_batch(device, dtype, seed=99)


def saved_and_loaded(state):
    """Through a file, as a checkpoint is read by default: no arbitrary objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- the class -----------------------------------------------------------------------------------


def test_it_is_an_optimizer_and_says_what_it_wraps(net):
    optimizer = wrap(net, "adamw")
    assert isinstance(optimizer, torch.optim.Optimizer)
    for part in ("BayesAggWrapper", "AdamW", "regression 4 -> 2", "multiclass 4 -> 3", "lr: 0.01"):
        assert part in repr(optimizer)


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


def test_assigned_groups_state_and_defaults_reach_the_base(net):
    """As checkpoint libraries assign them."""
    optimizer = wrap(net, "adam")
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
    x, labels = batch
    before = net.heads["cls"].weight.detach().clone()
    optimizer.step(make_losses(net(x), labels))
    torch.testing.assert_close(
        net.heads["cls"].weight, before - 0.5 * net.heads["cls"].weight.grad, rtol=0, atol=0
    )


@pytest.mark.parametrize("wrong", ["sgd", 3, None])
def test_only_an_optimizer_can_be_wrapped(wrong, net):
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        BayesAggWrapper(wrong, net.trunk, make_heads(net))


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


@pytest.mark.parametrize("base", PLAIN_BASES)
@pytest.mark.parametrize("form", ["backward", "loss", "closure", "keyword", "targets", "empty"])
def test_all_forms_of_a_step_agree(form, base, rule, device, dtype):
    """``step(losses)``, ``backward`` or ``loss`` and ``step()``, ``step(closure)`` either way."""
    nets = [plain_net(device, dtype) for _ in range(2)]
    one, other = (wrap(net, base, rule, settings=QUICK) for net in nets)
    for index in range(7):
        train_step(nets[0], one, index)
        x, labels = make_batch(device, dtype, seed=index)

        def closure(x=x, labels=labels):
            other.zero_grad()
            return other.backward(make_losses(nets[1](x), labels))

        if form == "closure":
            result = other.step(closure)
        elif form == "keyword":
            result = other.step(closure=closure)
        else:
            other.zero_grad()
            losses = make_losses(nets[1](x), labels)
            if form in ("backward", "loss"):
                result = other.backward(losses) if form == "backward" else other.loss(losses)
                if form == "loss":
                    result.backward()
                    result = result.detach()
                assert other.step() is None
            else:
                given = {"reg": labels["reg"]} if form == "targets" else {}
                result = other.step(losses, targets=given)
            assert result == sum(losses.values())
        assert not result.requires_grad
        assert result.dim() == 0
    ours, theirs = snapshot(nets[0], one), snapshot(nets[1], other)
    if form == "targets":  # given labels are not rounded as recovered ones are
        torch.testing.assert_close(ours["parameters"], theirs["parameters"])
    else:
        assert_same(ours, theirs)


def test_an_optimizer_that_needs_a_closure(rule, net, batch):
    """LBFGS evaluates it again and again; without one the error says how, and nothing changes."""
    optimizer = wrap(net, "lbfgs", rule)
    x, labels = batch
    losses = make_losses(net(x), labels)
    before = snapshot(net, optimizer)
    for arguments in ((), (losses,)):
        with pytest.raises(TypeError, match=r"closure.*optimizer\.step\(closure\)"):
            optimizer.step(*arguments)
    assert_same(before, snapshot(net, optimizer))
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(float(optimizer.backward(make_losses(net(x), labels))))
        return torch.tensor(calls[-1])

    for _ in range(8):
        optimizer.step(closure)
    assert len(calls) > 8
    assert calls[-1] < calls[0]
    assert_finite(snapshot(net, optimizer))


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
    x, labels = batch
    optimizer.step(make_losses(net(x), labels))
    before = optimizer.state_dict()["bayesagg"]
    for _ in range(EPOCH):
        optimizer.step()
        optimizer.step(closure=None)
    assert difference(before, optimizer.state_dict()["bayesagg"]) is None


# --- learning rate schedulers --------------------------------------------------------------------

SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


# SequentialLR of older versions passes the epoch on, which they deprecate themselves.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler:UserWarning")
@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_schedulers_drive_the_base(name, base, rule, net, device, dtype):
    """The same rates (and momenta) as on a plain optimizer, and no warning (which is an error)."""
    plain_net = make_net(device, dtype)
    plain = OPTIMIZERS[base](plain_net.parameters())
    optimizer = wrap(net, base, rule, settings=QUICK)
    schedulers = [SCHEDULERS[name](o) for o in (plain, optimizer)]
    seen = set()
    for index in range(10):
        train_step(net, optimizer, index)
        plain.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "plateau" else []))
        ours, theirs = (
            {k: v for k, v in o.param_groups[0].items() if k != "params"}
            for o in (optimizer.base_optimizer, plain)
        )
        assert ours == theirs
        seen.add(ours["lr"])
    assert len(seen) > 1


def test_a_scheduled_rate_is_used(rule, net, batch):
    optimizer = wrap(net, "sgd", rule)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(net, optimizer, 1)
    scheduler.step()
    before = snapshot(net.trunk)["parameters"]
    x, labels = batch
    optimizer.step(make_losses(net(x), labels))
    assert_same(before, snapshot(net.trunk)["parameters"])


def test_a_scheduler_before_the_optimizer_still_warns(rule, net):
    """The order is watched through ``step``, which the scheduler patches."""
    optimizer = wrap(net, rule=rule)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step"):
        scheduler.step()


def test_schedulers_survive_a_checkpoint(rule, net, device, dtype):
    optimizer = wrap(net, rule=rule, settings=QUICK)
    scheduler = lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for index in range(3):
        train_step(net, optimizer, index)
        scheduler.step()
    other_net = make_net(device, dtype, seed=1)
    other = wrap(other_net, rule=rule, settings=QUICK)
    other_scheduler = lr_scheduler.StepLR(other, 2, gamma=0.5)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    other_scheduler.load_state_dict(saved_and_loaded(scheduler.state_dict()))
    train_step(other_net, other, 3)
    other_scheduler.step()
    assert other.base_optimizer.param_groups[0]["lr"] == 0.01 * 0.25


# --- checkpoints ---------------------------------------------------------------------------------


def assert_resumes(like, rule, base, settings, stop, last=8, **kwargs):
    """Stopping after ``stop`` steps and going on from the file gives the same bits."""
    closure = base == "lbfgs"
    net = make_net(*like)
    optimizer = wrap(net, base, rule, settings=settings, **kwargs)
    train(net, optimizer, stop, closure=closure)
    file = saved_and_loaded({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, range(stop, last), closure=closure)

    other_net = make_net(*like, seed=1)
    other = wrap(other_net, base, rule, settings=settings, **kwargs)
    train(other_net, other, range(20, 22), closure=closure)  # all of which is to be overwritten
    other_net.load_state_dict(file["net"])
    other.load_state_dict(file["optimizer"])
    train(other_net, other, range(stop, last), closure=closure)
    # torch itself adds an entry to the defaults on loading
    assert_same(snapshot(net, optimizer), snapshot(other_net, other), ignore=["defaults"])


# Steps before the stop: within pre-training and an epoch, and at the end of each.
RESUMED = [
    *((rule, "adam", QUICK, stop, {}) for rule in RULES for stop in (1, 3, 5, 6)),
    *((rule, base, QUICK, 5, {}) for rule in RULES for base in BASES),
    *((rule, "adam", settings, 5, {}) for rule in RULES for settings in SETTINGS.values()),
    *(
        (rule, "momentum", SAMPLED, 4, kwargs)
        for rule, own in ARGUMENTS.items()
        for kwargs in ({"seed": 7}, {"dtype": torch.float32}, *own)
    ),
]


@pytest.mark.parametrize(("rule", "base", "settings", "stop", "kwargs"), RESUMED)
def test_a_loaded_run_goes_on_in_the_same_bits(rule, base, settings, stop, kwargs, device, dtype):
    assert_resumes((device, dtype), rule, base, settings, stop, **kwargs)


@pytest.mark.parametrize("precisions", [("float64", "float32"), ("float32", "float64")])
def test_a_checkpoint_of_another_precision(precisions, rule, net, device, dtype):
    """The posterior goes on in the precision of the engine that loads it."""
    saved, loaded = (getattr(torch, name) for name in precisions)
    optimizer = wrap(net, rule=rule, settings=QUICK, dtype=saved)
    train(net, optimizer, 4)
    other_net = make_net(device, dtype, seed=1)
    other = wrap(other_net, rule=rule, settings=QUICK, dtype=loaded)
    other.load_state_dict(optimizer.state_dict())
    train(other_net, other, range(4, 8))
    found = tensors_of(other.state_dict()["bayesagg"]["memory"])
    assert {tensor.dtype for tensor in found} == {loaded}


def test_state_dict_is_a_copy_of_the_posterior(rule, net):
    """Later training does not reach into a state that was taken before."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    train(net, optimizer, 4)
    state = optimizer.state_dict()["bayesagg"]
    copied = copy.deepcopy(state)
    train(net, optimizer, range(4, 9))
    assert difference(copied, state) is None
    assert difference(state, optimizer.state_dict()["bayesagg"]) is not None


def test_a_loaded_state_is_copied(rule, net, device, dtype):
    """Training after loading does not reach into the state that was loaded."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    train(net, optimizer, 4)
    state = optimizer.state_dict()["bayesagg"]
    copied = copy.deepcopy(state)
    other_net = make_net(device, dtype, seed=1)
    other = wrap(other_net, rule=rule, settings=QUICK)
    other.load_state_dict({**other.base_optimizer.state_dict(), "bayesagg": state})
    train(other_net, other, range(4, 9))
    assert difference(copied, state) is None


def test_a_state_of_the_wrapper_has_the_parts_of_any_optimizer(net):
    """Plain tools find ``state`` and ``param_groups``, and the base loads them."""
    optimizer = wrap(net, "adam")
    train(net, optimizer, 2)
    state = optimizer.state_dict()
    assert set(state) >= {"state", "param_groups"}
    plain = torch.optim.Adam(net.parameters())
    plain.load_state_dict({key: state[key] for key in ("state", "param_groups")})
    assert len(plain.state) == len(optimizer.state)


# --- hooks ---------------------------------------------------------------------------------------


def test_step_hooks_fire_once_and_see_the_wrapper(rule, net, batch):
    optimizer = wrap(net, rule=rule)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o, args)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o, args)))
    x, labels = batch
    losses = make_losses(net(x), labels)
    optimizer.step(losses)
    assert [kind for kind, *_ in seen] == ["pre", "post"]
    for _, seen_optimizer, args in seen:
        assert seen_optimizer is optimizer
        assert args[-1] is losses
    optimizer.backward(make_losses(net(x), labels))
    assert len(seen) == 2
    optimizer.step()
    assert len(seen) == 4


def test_a_step_pre_hook_can_replace_the_losses(rule, net, batch):
    optimizer = wrap(net, rule=rule)
    x, labels = batch
    handle = optimizer.register_step_pre_hook(
        lambda o, args, kwargs: ((o, {"reg": args[-1]["reg"]}), kwargs)
    )
    optimizer.step(make_losses(net(x), labels))
    assert net.heads["bin"].weight.grad is None
    assert net.heads["reg"].weight.grad is not None
    handle.remove()
    optimizer.step(make_losses(net(x), labels))
    assert net.heads["bin"].weight.grad is not None


def test_step_hooks_of_the_base_and_of_all_optimizers_fire_once(rule, net):
    """Also where a scheduler has patched ``step``."""
    optimizer = wrap(net, rule=rule)
    lr_scheduler.StepLR(optimizer, 1)
    base, seen = optimizer.base_optimizer, []
    base.register_step_pre_hook(lambda *_: seen.append("base pre"))
    base.register_step_post_hook(lambda *_: seen.append("base post"))
    optimizer.register_step_post_hook(lambda *_: seen.append("own post"))
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(("pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(("post", o))),
    ]
    try:
        train(net, optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    own = [item if isinstance(item, str) else item[0] for item in seen if item[1] is not base]
    assert sorted(own) == ["base post", "base pre", "own post", "post", "pre"]


def test_state_dict_hooks_fire(rule, net):
    optimizer = wrap(net, rule=rule)
    seen = []

    def post(o, state):
        seen.append(("post", o))
        return {**state, "extra": 1}

    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))
    optimizer.register_state_dict_post_hook(post)
    state = optimizer.state_dict()
    assert seen == [("pre", optimizer), ("post", optimizer)]
    assert state["extra"] == 1
    assert "bayesagg" in state


def test_load_state_dict_hooks_fire(rule, net):
    optimizer = wrap(net, rule=rule)
    state = optimizer.state_dict()
    seen = []

    def pre(o, given):
        seen.append(("pre", o))
        given = copy.deepcopy(given)
        given["param_groups"][0]["lr"] = 0.25
        return given

    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("post", o)))
    optimizer.load_state_dict(state)
    assert seen == [("pre", optimizer), ("post", optimizer)]
    assert optimizer.param_groups[0]["lr"] == 0.25


# --- copies --------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("kind", sorted(COPIES))
@pytest.mark.parametrize("base", PLAIN_BASES)  # torch's LBFGS does not survive a copy
@pytest.mark.parametrize("order", ["model_first", "optimizer_first"])
def test_a_copy_trains_alike_and_apart(order, base, kind, rule, net):
    """The copy continues in the same bits; neither of the two touches the other."""
    optimizer = wrap(net, base, rule, settings=QUICK)
    lr_scheduler.StepLR(optimizer, 1)  # which patches `step` on the instance
    train(net, optimizer, 4)
    before = snapshot(net, optimizer)
    if order == "model_first":
        other_net, other = COPIES[kind]((net, optimizer))
    else:
        other, other_net = COPIES[kind]((optimizer, net))
    # torch copies no gradients of parameters
    assert_same(before, snapshot(other_net, other), ignore=["gradients", "defaults"])
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.param_groups[0]["params"][0] is other_net.trunk[0].weight
    train(other_net, other, range(4, 8))
    assert_same(before, snapshot(net, optimizer))
    after = snapshot(other_net, other)
    train(net, optimizer, range(4, 8))
    assert_same(after, snapshot(net, optimizer), ignore=["defaults"])
    assert_same(after, snapshot(other_net, other))


def test_step_hooks_work_in_a_copy(net):
    """Hooks themselves are not copied, as with any optimizer, but can be registered."""
    _, optimizer = copy.deepcopy((net, wrap(net)))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step()
    assert seen == [1]


# --- between backward and step -------------------------------------------------------------------


@PHASES
def test_clipping_between_backward_and_step(steps, rule, net, batch):
    optimizer = wrap(net, "sgd", rule)
    train(net, optimizer, steps)
    x, labels = batch
    optimizer.zero_grad()
    optimizer.backward(make_losses(net(x), labels))
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert norm > 1e-3
    before = snapshot(net)["parameters"]
    optimizer.step()
    moved = [
        (p - before[name]).square().sum()
        for name, p in net.named_parameters()
        if p.grad is not None  # the posterior may have written the regression head
    ]
    torch.testing.assert_close(
        torch.stack(moved).sum().sqrt().item(), 0.05 * 1e-3, rtol=1e-3, atol=0.0
    )


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


# --- gradient scaling ----------------------------------------------------------------------------


def scaled_step(net, optimizer, scaler, index, *, form="scalar", overflow=None):
    """One step under a scaler; the gradient overflows at the trunk's weight or at an output."""
    x, labels = make_batch(next(net.parameters()).device, torch.float32, seed=index)
    optimizer.zero_grad()
    out = net(x)
    handle = None
    if overflow == "trunk":
        handle = net.trunk[0].weight.register_hook(lambda g: g * torch.inf)
    elif overflow is not None:
        out[overflow].register_hook(lambda g: g * torch.inf)
    losses = make_losses(out, labels)
    if form == "scalar":
        scaler.scale(optimizer.loss(losses)).backward()
    else:
        optimizer.backward({name: scaler.scale(loss) for name, loss in losses.items()})
    if handle is not None:
        handle.remove()
    scaler.step(optimizer)
    scaler.update()


def scaler_for(device):
    return torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=10**6)


FORMS = pytest.mark.parametrize("form", ["scalar", "losses"])


@FORMS
@pytest.mark.parametrize("settings", ["same_s", "own_s"])
def test_a_scaler_changes_nothing_but_rounding(settings, form, rule, device):
    """Also where the tasks weigh their precision by different exponents."""
    s = {"same_s": (0.85, 0.85, 0.85), "own_s": (0.85, 0.3, 0.0)}[settings]
    settings = {name: {"s": value} for name, value in zip(("reg", "bin", "cls"), s, strict=True)}
    nets = [make_net(device, torch.float32) for _ in range(2)]
    plain, scaled = (wrap(net, "sgd", rule, settings=settings) for net in nets)
    scaler = scaler_for(device)
    for index in range(8):
        train_step(nets[0], plain, index)
        scaled_step(nets[1], scaled, scaler, index, form=form)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    parameters = [snapshot(net)["parameters"] for net in nets]
    torch.testing.assert_close(*parameters, **tolerance)
    torch.testing.assert_close(plain.task_weights, scaled.task_weights, **tolerance)
    if form == "scalar":  # what is read does not know of the scaler
        states = [tensors_of(o.state_dict()["bayesagg"]) for o in (plain, scaled)]
        torch.testing.assert_close(*states, **tolerance)


@FORMS
@pytest.mark.parametrize("overflow", ["reg", "cls"])
@PHASES
def test_an_overflow_that_shows_in_the_losses_leaves_no_trace(steps, overflow, form, rule, device):
    """The run is one in which the step was never tried."""
    results = []
    for skip in (False, True):
        net = make_net(device, torch.float32)
        net.trunk[1].eval()  # its running statistics move in any forward pass
        optimizer, scaler = wrap(net, "momentum", rule), scaler_for(device)
        for index in range(steps):
            scaled_step(net, optimizer, scaler, index, form=form)
        if skip:
            before = snapshot(net, optimizer)
            scaled_step(net, optimizer, scaler, 99, form=form, overflow=overflow)
            assert scaler.get_scale() == 2.0**9
            assert_same(before, snapshot(net, optimizer), ignore=["gradients"])
        scaler = scaler_for(device)
        for index in range(steps, 7):
            scaled_step(net, optimizer, scaler, index, form=form)
        results.append(snapshot(net, optimizer))
    assert_same(*results)


# --- as other code uses optimizers ---------------------------------------------------------------


def test_wrapped_engine_is_public(rule, net):
    optimizer = wrap(net, rule=rule)
    assert isinstance(optimizer.engine, BayesAgg)
    assert optimizer.task_weights is optimizer.engine.task_weights
    assert set(optimizer.task_weights) == {"reg", "bin", "cls"}


@PHASES
def test_task_weights_sum_to_one(steps, rule, net):
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, steps)
    weights = optimizer.task_weights
    assert {name: len(w) for name, w in weights.items()} == {"reg": 2, "bin": 2, "cls": 1}
    assert sum(w.sum() for w in weights.values()).item() == pytest.approx(1)
    uniform = all(torch.allclose(w, torch.full_like(w, 0.2)) for w in weights.values())
    assert uniform == (steps == 1)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction, rule, device, dtype):
    """A sum is B times the mean; unreduced losses are averaged."""
    results = []
    for kind in ("mean", reduction):
        net = make_net(device, dtype)
        optimizer = wrap(net, "sgd", rule)
        train(net, optimizer, 4)
        x, labels = make_batch(device, dtype, seed=9)
        losses = make_losses(net(x), labels, kind)
        if kind == "sum":
            losses = {n: v / (labels[n].numel()) for n, v in losses.items()}
        optimizer.step(losses)
        results.append(snapshot(net, optimizer))
    torch.testing.assert_close(results[0]["parameters"], results[1]["parameters"])


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
    optimizer.step(losses)
    assert F.mse_loss(net(x)["reg"], labels["reg"]).isfinite()

"""Schedulers, step hooks and gradient scalers drive the wrapper as any optimizer."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net
from tests.helpers.settings import OPTIMIZERS, PHASES, QUICK
from tests.helpers.states import assert_same, snapshot, tensors_of
from tests.helpers.training import train, train_step, wrap

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
@pytest.mark.parametrize(("base", "rule"), [("momentum", "likelihood"), ("adam", "paper")])
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


def test_a_scheduler_before_the_optimizer_still_warns(rule, net):
    """The order is watched through ``step``, which the scheduler patches."""
    optimizer = wrap(net, rule=rule)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"lr_scheduler\.step\(\)` before `optimizer\.step"):
        scheduler.step()


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
    handle = optimizer.register_step_pre_hook(
        lambda o, args, kwargs: ((o, {"reg": args[-1]["reg"]}), kwargs)
    )
    train_step(net, optimizer, batch)
    assert net.heads["bin"].weight.grad is None
    assert net.heads["reg"].weight.grad is not None
    handle.remove()
    train_step(net, optimizer, batch)
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


def test_hooks_of_states_fire(rule, net):
    """They see the wrapper, and what they return is what is saved or loaded."""
    optimizer, seen = wrap(net, rule=rule), []

    def saved(o, state):
        seen.append(("saved", o))
        return {**state, "extra": 1}

    def loading(o, given):
        seen.append(("loading", o))
        given = copy.deepcopy(given)
        given["param_groups"][0]["lr"] = 0.25
        return given

    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("saving", o)))
    optimizer.register_state_dict_post_hook(saved)
    optimizer.register_load_state_dict_pre_hook(loading)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o)))
    state = optimizer.state_dict()
    assert state.pop("extra") == 1 and "bayesagg" in state
    optimizer.load_state_dict(state)
    assert seen == [(what, optimizer) for what in ("saving", "saved", "loading", "loaded")]
    assert optimizer.param_groups[0]["lr"] == 0.25


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

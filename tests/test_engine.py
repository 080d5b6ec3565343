"""The engine over whole training runs: what it watches, what it leaves alone, what it keeps.

What belongs to one rule alone is in ``tests/rules``; what a step computes, there and in
``test_scalar.py``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from bayesagg import RegressionHead
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import EPOCH, OPTIMIZERS, OUTPUTS, PHASES, QUICK, SAMPLED, WIDTH
from tests.helpers.states import (
    assert_finite,
    assert_same,
    difference,
    gradients,
    rounding,
    snapshot,
)
from tests.helpers.training import make_engine, make_heads, train, train_step, wrap


@pytest.fixture
def net(device, dtype):
    return make_net(device, dtype)


@pytest.fixture
def batch(device, dtype):
    return make_batch(device, dtype, seed=99)


# --- what leaves no trace ------------------------------------------------------------------------


def evaluate(net, x, mode):
    """A forward pass without training; the features it made, seen weakly."""
    seen = []
    handle = net.trunk.register_forward_hook(lambda m, a, h: seen.append(weakref.ref(h)))
    net.train("eval" not in mode)
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with contexts.get(mode.removeprefix("eval_"), contextlib.nullcontext)():
        out = net(x)
    net.train()
    handle.remove()
    assert out["reg"].requires_grad == (mode == "eval")
    return seen[0]


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference", "eval_no_grad"])
@pytest.mark.parametrize("when", ["between_steps", "between_forward_and_backward"])
def test_evaluation_leaves_no_trace(when, mode, rule, device, dtype, batch):
    """Neither in the state nor in memory; the training forward pass before it still counts."""
    x, labels = batch
    results = []
    for evaluated in (False, True):
        net = plain_net(device, dtype)
        optimizer = wrap(net, rule=rule, settings=QUICK)
        train(net, optimizer, 4)
        losses = make_losses(net(x), labels) if when == "between_forward_and_backward" else None
        if evaluated:
            before = snapshot(net, optimizer)
            assert evaluate(net, x + 1, mode)() is None
            assert_same(before, snapshot(net, optimizer))
        optimizer.step(losses or make_losses(net(x), labels))
        results.append(snapshot(net, optimizer))
    assert_same(*results)


def test_a_step_keeps_nothing_of_its_graph(rule, net, batch):
    """Features and outputs are freed with the last reference of the user."""
    x, labels = batch
    optimizer = wrap(net, rule=rule, settings=QUICK)
    seen = []
    for module in (net.trunk, *net.heads.values()):
        module.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    for _ in range(5):
        optimizer.step(make_losses(net(x), labels))
        assert len(seen) == 4
        assert [ref() for ref in seen] == [None] * 4
        seen.clear()


def test_forward_passes_that_no_loss_needs(rule, device, dtype, batch):
    """They take no part in the step, which frees them."""
    x, labels = batch
    results = []
    for more in (False, True):
        net = plain_net(device, dtype)
        optimizer = wrap(net, rule=rule, settings=QUICK)
        train(net, optimizer, 4)
        seen = []
        handle = net.trunk.register_forward_hook(lambda m, a, h, s=seen: s.append(weakref.ref(h)))
        for shift in (1, 2) if more else ():
            net(x + shift)
        handle.remove()
        optimizer.step(make_losses(net(x), labels))
        assert [ref() for ref in seen] == [None] * (2 * more)
        results.append(snapshot(net, optimizer))
    assert_same(*results)


def test_a_thousand_forward_passes_without_a_step_are_announced(rule, net, batch):
    """As of a loop that evaluates in training mode; the last of them still counts."""
    x, labels = batch
    optimizer = wrap(net, rule=rule)
    h = net.trunk(x)
    with pytest.warns(UserWarning, match=r"head 'reg' was called 1000 times.*no_grad"):
        for _ in range(1001):
            net.heads["reg"](h)
    optimizer.step(make_losses(net(x), labels))
    assert net.trunk[0].weight.grad.any()


# --- who takes part ------------------------------------------------------------------------------


ABSENT = pytest.mark.parametrize(
    "absent", [["reg"], ["bin"], ["cls"], ["reg", "cls"]], ids="-".join
)


@PHASES
@ABSENT
def test_absent_tasks_take_no_part(absent, steps, rule, device, dtype, batch):
    """No gradient and no say: whatever their heads are, the step is the same."""
    x, labels = batch
    kept = [name for name in OUTPUTS if name not in absent]
    found = []
    for other in (0.0, 1.0):
        net = make_net(device, dtype)
        optimizer = wrap(net, "sgd", rule)
        train(net, optimizer, steps)
        with torch.no_grad():
            for name in absent:
                net.heads[name].weight.add_(other)
        net.zero_grad()
        losses = make_losses(net(x), labels)
        optimizer.step({name: losses[name] for name in kept})
        found.append([gradients(net), dict(optimizer.task_weights)])
    assert difference(*found) is None
    posterior = ["reg"] if rule == "paper" else list(OUTPUTS)  # sets these heads
    without = absent + posterior * (steps == 4)
    for name, gradient in found[0][0].items():
        assert (gradient is None) == (name.split(".")[1] in without)
    weights = found[0][1]
    if steps == 4:
        assert all(not weights[name].any() for name in absent)
    assert sum(w.sum() for w in weights.values()).item() == pytest.approx(1)


@ABSENT
def test_tasks_that_are_always_absent_might_as_well_not_be_there(absent, rule, device, dtype):
    """The engine is one without them, and their heads stay as they are."""
    kept = [name for name in OUTPUTS if name not in absent]
    nets = [make_net(device, dtype) for _ in range(2)]
    heads = [make_heads(net, rule) for net in nets]
    heads[1] = {name: heads[1][name] for name in kept}
    optimizers = [
        wrap(net, "momentum", rule, heads=own) for net, own in zip(nets, heads, strict=True)
    ]
    before = snapshot(nets[0])["parameters"]
    for index in range(EPOCH + 3):
        x, labels = make_batch(device, dtype, seed=index)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            losses = make_losses(net(x), labels)
            optimizer.step({name: losses[name] for name in kept})
    torch.testing.assert_close(*(snapshot(net)["parameters"] for net in nets))
    for name, p in nets[0].named_parameters():
        if name.split(".")[1] in absent:
            assert torch.equal(before[name], p) and p.grad is None


def test_a_task_keeps_its_evidence_while_it_has_no_labels(rule, device, dtype, batch):
    """It goes on where it was."""
    x, labels = batch
    epoch = {"steps_per_epoch": 1, "settings": SAMPLED} if rule == "paper" else {}
    results = []
    for pause in (0, 2):
        net = plain_net(device, dtype)
        still = torch.optim.SGD(net.parameters(), lr=0.0)  # nothing but the posterior moves
        optimizer = wrap(net, still, rule, **epoch)
        train(net, optimizer, EPOCH + 1)
        before = net.heads["reg"].weight.detach().clone()
        for _ in range(pause):
            optimizer.step({"bin": make_losses(net(x), labels)["bin"]})
        torch.testing.assert_close(net.heads["reg"].weight.detach(), before)
        optimizer.step({"reg": make_losses(net(x), labels)["reg"]})
        assert not torch.equal(net.heads["reg"].weight, before)
        results.append(net.heads["reg"].weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["reg", "bin", "cls"])
def test_missing_labels_of_one_task_are_a_smaller_batch(name, rule, device, dtype):
    """With a single task, data without a label might as well not be there."""
    results = []
    for drop in (False, True):
        net = plain_net(device, dtype, outputs={name: OUTPUTS[name]})
        optimizer = wrap(net, "sgd", rule)
        for index in range(7):
            x, labels = make_batch(device, dtype, seed=index)
            y = labels[name]
            missing = torch.arange(len(x), device=device) % 3 == index % 3
            optimizer.zero_grad()
            if drop:
                losses = make_losses(net(x[~missing]), {name: y[~missing]}, "sum")
                optimizer.step(losses)
                continue
            out = net(x)[name]
            losses = make_losses({name: out[~missing]}, {name: y[~missing]}, "sum")
            y = y.clone()
            y[missing] = -100 if name == "cls" else torch.nan
            optimizer.step(losses, targets={name: y})
        results.append(snapshot(net, optimizer))
    torch.testing.assert_close(*(r["parameters"] for r in results), **rounding(dtype))
    torch.testing.assert_close(*(r["gradients"] for r in results), **rounding(dtype))


# --- one of several, alone, apart ----------------------------------------------------------------


@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["quadrature", "sampled"])
def test_the_engine_alone_equals_the_wrapper(settings, base, rule, device, dtype):
    """Bit for bit, with an optimizer of one's own."""
    nets = [make_net(device, dtype) for _ in range(2)]
    wrapper = wrap(nets[0], base, rule, settings=settings)
    train(nets[0], wrapper, 8)
    optimizer = OPTIMIZERS[base](nets[1].parameters())
    engine = make_engine(nets[1], rule, settings=settings)
    for index in range(8):
        x, labels = make_batch(device, dtype, seed=index)
        optimizer.zero_grad()
        total = engine.backward(make_losses(nets[1](x), labels))
        assert not total.requires_grad
        optimizer.step()
        engine.stepped()
    ours, theirs = snapshot(nets[0], wrapper), snapshot(nets[1], optimizer)
    assert difference(ours["optimizer"].pop("bayesagg"), engine.get_extra_state()) is None
    for key in ("parameters", "gradients", "buffers", "optimizer"):
        assert difference(ours[key], theirs[key]) is None, key


@pytest.mark.parametrize(("base", "invariant"), [("adam", True), ("sgd", False)])
def test_the_engine_alone_meets_the_optimizer_of_its_heads(base, invariant, rule, device, dtype):
    """Whose step may depend on the gradient's scale or not; any other is of no interest."""
    net, stranger = make_net(device, dtype), make_net(device, dtype)
    engine = make_engine(net, rule)
    for a_net, met in ((stranger, False), (net, True)):
        optimizer = OPTIMIZERS[base](a_net.parameters())
        x, labels = make_batch(device, dtype)
        sum(make_losses(a_net(x), labels).values()).backward()
        optimizer.step()
        state = engine.get_extra_state()
        assert state["optimizer_known"] == met
        assert state["memory"].get("invariant", met and invariant) == (met and invariant)


class Module(nn.Module):
    """A training module that owns network and engine, as trainers want it."""

    def __init__(self, net: nn.Module, rule: str) -> None:
        super().__init__()
        self.net = net
        self.engine = make_engine(net, rule, settings=SAMPLED)


def run(module, optimizer, steps):
    """Steps of a :class:`Module`."""
    for index in steps:
        like = next(module.parameters())
        x, labels = make_batch(like.device, like.dtype, seed=index)
        optimizer.zero_grad()
        module.engine(make_losses(module.net(x), labels)).backward()
        optimizer.step()
        module.engine.stepped()


def test_an_engine_as_attribute_registers_no_parameters(rule, net):
    """Nothing appears twice; what it knows is in the module's state under its own name."""
    plain = set(net.state_dict())
    module = Module(net, rule)
    assert len(list(module.parameters())) == len(list(net.parameters()))
    assert set(module.state_dict()) == {f"net.{key}" for key in plain} | {"engine._extra_state"}
    assert set(net.state_dict()) == plain
    assert not list(module.engine.parameters()) and not list(module.engine.children())


@pytest.mark.parametrize("stop", [2, 5, 6], ids=["pretraining", "mid_epoch", "end"])
def test_an_engine_as_attribute_is_saved_with_the_module(stop, rule, device, dtype):
    """``state_dict`` and ``load_state_dict`` of the module carry the posterior, bit for bit."""
    modules = [Module(make_net(device, dtype, seed=seed), rule) for seed in (0, 1)]
    optimizers = [OPTIMIZERS["adam"](module.parameters()) for module in modules]
    run(modules[0], optimizers[0], range(stop))
    file = io.BytesIO()
    torch.save([modules[0].state_dict(), optimizers[0].state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    run(modules[1], optimizers[1], range(20, 24))
    modules[1].load_state_dict(states[0])
    optimizers[1].load_state_dict(states[1])
    for module, optimizer in zip(modules, optimizers, strict=True):
        run(module, optimizer, range(stop, 8))
    states = [snapshot(m.net, o) for m, o in zip(modules, optimizers, strict=True)]
    assert_same(*states, ignore=["defaults"])
    assert difference(*[m.engine.get_extra_state() for m in modules]) is None


def test_a_module_with_an_engine_can_be_copied(rule, net):
    """The copy's engine watches the copy, and only that."""
    module = Module(net, rule)
    optimizer = OPTIMIZERS["sgd"](module.parameters())
    run(module, optimizer, range(4))
    other = copy.deepcopy(module)
    before = snapshot(net, module.engine)
    run(other, OPTIMIZERS["sgd"](other.parameters()), range(4, 8))
    assert_same(before, snapshot(net, module.engine))
    run(module, optimizer, range(4, 8))
    assert_same(snapshot(other.net, other.engine), snapshot(net, module.engine))


# --- life of a wrapper ---------------------------------------------------------------------------


def hooks(model):
    return sum(
        len(found)
        for module in model.modules()
        for found in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._backward_hooks,
        )
    )


def held(thing, seen=None):
    """Tensors that an object keeps, found through its attributes."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, nn.Module | torch.Generator):
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    parts = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    return [tensor for part in parts for tensor in held(part, seen)]


@pytest.mark.parametrize("steps", [0, 4])
def test_a_deleted_wrapper_removes_its_hooks(steps, rule, net, batch):
    """Hooks and posteriors go with the wrapper; the model remains as it was before."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    assert hooks(net) > 0
    train(net, optimizer, steps)
    seen = []
    handle = net.trunk.register_forward_hook(lambda m, a, h: seen.append(weakref.ref(h)))
    out = net(batch[0])  # a forward pass that no step has used
    handle.remove()
    own = {id(p) for p in net.parameters()}
    evidence = [weakref.ref(t) for t in held(optimizer.engine._memory) if id(t) not in own]
    assert steps == 0 or len(evidence) >= 3
    refs = [weakref.ref(optimizer), weakref.ref(optimizer.engine), *evidence]
    del optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert hooks(net) == 0
    del out
    assert seen[0]() is None


def test_a_wrapper_and_its_model_are_freed_together(rule, device, dtype):
    net = make_net(device, dtype)
    optimizer = wrap(net, rule=rule)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(net, optimizer, 1)
    refs = [weakref.ref(net), weakref.ref(net.trunk), weakref.ref(optimizer)]
    del net, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_a_scalar_that_is_never_used_is_freed(rule, net, batch):
    """With its graph, and without a trace in the posterior."""
    x, labels = batch
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, 4)
    before = snapshot(net, optimizer)
    seen = []
    net.trunk[0].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    net.eval(), net.trunk.train(False)
    net.heads.train()
    loss = optimizer.loss(make_losses(net(x), labels))
    net.train()
    del loss
    gc.collect()
    assert seen[0]() is None
    seen.clear()
    assert_same(before, snapshot(net, optimizer), ignore=["hooks"])


def test_a_failed_wrapper_leaves_no_hooks(net):
    """Wrapping that fails at its last check leaves the model alone."""
    for wrong in ({"rule": "nash"}, {"steps_per_epoch": 0}, {"process_group": "all"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            wrap(net, **wrong)
    gc.collect()
    assert hooks(net) == 0


def test_a_wrapper_can_be_replaced(rule, net):
    """As a notebook cell that is run twice does; the old one is gone."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    count = hooks(net)
    optimizer = wrap(net, rule=rule, settings=QUICK)
    gc.collect()
    assert hooks(net) == count
    train(net, optimizer, 4)


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda net: AveragedModel(net).module,
    "saved": saved_whole,
}


@pytest.mark.parametrize("kind", sorted(COPIES))
def test_a_copied_model_has_no_live_hook(kind, rule, net, batch):
    """An average or a saved model reports to nobody, in training mode too, and trains alone."""
    x, labels = batch
    optimizer = wrap(net, rule=rule, settings=QUICK)
    train(net, optimizer, 4)
    losses = make_losses(net(x), labels)
    other = COPIES[kind](net)
    before = snapshot(net, optimizer)
    other.train()
    sum(make_losses(other(x + 1), labels).values()).backward()
    assert_same(before, snapshot(net, optimizer))
    optimizer.step(losses)  # the forward pass of the original still counts
    assert net.trunk[0].weight.grad.any()
    ref = weakref.ref(optimizer)
    del optimizer, losses
    gc.collect()
    assert ref() is None
    other(x)


@pytest.mark.parametrize("kind", sorted(COPIES))
def test_a_copied_model_can_be_wrapped(kind, rule, device, dtype):
    """It trains as the original does, and carries no more hooks than it needs."""
    net = make_net(device, dtype)
    optimizer = wrap(net, rule=rule, settings=QUICK)
    other = COPIES[kind](net)
    other_optimizer = wrap(other, rule=rule, settings=QUICK)
    assert hooks(other) == hooks(net)
    for index in range(5):
        train_step(net, optimizer, index)
        train_step(other, other_optimizer, index)
    assert_same(
        snapshot(net, optimizer)["parameters"], snapshot(other, other_optimizer)["parameters"]
    )
    del optimizer, other_optimizer
    gc.collect()
    assert hooks(other) == hooks(net) == 0


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_hooks_of_others_in_a_saved_model(wrapped, place, net, batch, monkeypatch):
    """A hook of the user's gets the arguments of any hook.

    The process that loads a model counts its hooks from zero again, so that the user's may get a
    number that was the wrapper's.
    """
    optimizer = wrap(net, rule="likelihood")
    ours = (
        net.heads["reg"]._forward_pre_hooks
        if place == "before"
        else (net.heads["reg"]._forward_hooks)
    )
    number = next(iter(ours))
    other = saved_whole(net)
    wrappers = [optimizer, wrap(other)] if wrapped else [optimizer]
    monkeypatch.setattr(RemovableHandle, "next_id", number)
    head, seen = other.heads["reg"], []
    if place == "before":  # under a number that took keywords, and is given them still
        head.register_forward_pre_hook(lambda module, args, *_: seen.append(args))
    else:
        head.register_forward_hook(lambda module, args, output: seen.append(output))
    other(batch[0])
    assert len(seen) == len(wrappers[:1])


# --- heads ---------------------------------------------------------------------------------------


@PHASES
def test_a_sequence_of_heads_is_named_by_number(steps, rule, device, dtype):
    """And takes losses in the same order, equal to a mapping."""
    results = []
    for kind in ("mapping", "sequence"):
        net = make_net(device, dtype)
        heads = list(make_heads(net, rule, **QUICK).values())
        optimizer = wrap(net, rule=rule, heads=heads)
        assert list(optimizer.task_weights) == ["0", "1", "2"]
        for index in range(steps + 1):
            x, labels = make_batch(device, dtype, seed=index)
            losses = list(make_losses(net(x), labels).values())
            if kind == "mapping":
                losses = dict(zip("012", losses, strict=True))
            optimizer.step(losses)
        results.append(snapshot(net, optimizer))
    assert_same(*results)


def test_heads_with_and_without_bias_go_together(rule, device, dtype):
    net = plain_net(device, dtype, outputs={"reg": 2, "bin": 1, "cls": 3})
    heads = make_heads(net, rule)
    net.heads["bare"] = nn.Linear(WIDTH, 1, bias=False).to(net.trunk[0].weight)
    optimizer = wrap(net, "sgd", rule, heads={**heads, "bare": RegressionHead(net.heads["bare"])})
    for index in range(2 * EPOCH):
        x, labels = make_batch(device, dtype, seed=index, outputs={"reg": 2, "bin": 1, "cls": 3})
        out = net(x)
        losses = make_losses({name: out[name] for name in labels}, labels)
        losses["bare"] = F.mse_loss(out["bare"], labels["reg"][:, :1])
        before = net.heads["bare"].weight.detach().clone()
        optimizer.step(losses)
        # Written by the posterior at the end of an epoch, or after every step.
        written = rule == "likelihood" or index % EPOCH == EPOCH - 1
        assert torch.equal(before, net.heads["bare"].weight) == (not written and index >= EPOCH)
    assert_finite(snapshot(net, optimizer))


def test_heads_may_be_called_with_a_keyword(rule, device, dtype):
    """The same bits."""
    results = []
    for keyword in (False, True):
        net = plain_net(device, dtype)
        optimizer = wrap(net, rule=rule, settings=SAMPLED)
        for index in range(5):
            x, labels = make_batch(device, dtype, seed=index)
            h = net.trunk(x)
            out = {n: head(input=h) if keyword else head(h) for n, head in net.heads.items()}
            optimizer.zero_grad()
            optimizer.step(make_losses(out, labels))
        results.append(snapshot(net, optimizer))
    assert_same(*results)


# --- one backward pass ---------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 7])
@pytest.mark.parametrize(
    ("rule", "kwargs"),
    [("likelihood", {}), ("paper", {}), ("paper", {"covariance": "full"})],
    ids=["likelihood", "paper", "paper_full"],
)
def test_one_backward_pass_through_the_trunk(rule, kwargs, tasks, device, dtype, batch):
    """Whatever the number of tasks, before and after pre-training."""
    net = plain_net(device, dtype, outputs={f"t{k}": 1 for k in range(tasks)})
    heads = {name: RegressionHead(module) for name, module in net.heads.items()}
    optimizer = wrap(net, "sgd", rule, heads=heads, **kwargs)
    passes = []
    net.trunk[0].weight.register_hook(lambda g: passes.append(g))
    x, labels = batch
    for step in range(EPOCH + 2):
        out = net(x)
        optimizer.step({n: F.mse_loss(z, labels["reg"][:, :1]) for n, z in out.items()})
        assert len(passes) == step + 1


@pytest.mark.parametrize(("first", "reduction"), [(0, "mean"), (1, "none"), (3, "sum")])
def test_training_begins_with_linear_scalarization(first, reduction, rule, device, dtype):
    """The gradients of the sum of the losses exactly, for that long and no longer."""
    net = make_net(device, dtype)
    kwargs = (
        {"steps_per_epoch": 2, "pretrain_epochs": first}
        if rule == "paper"
        else {"warmup": 2 * first}
    )
    optimizer = wrap(net, "sgd", rule, settings=SAMPLED, **kwargs)
    for index in range(2 * first + 2):
        x, labels = make_batch(device, dtype, seed=index)
        optimizer.zero_grad()
        losses = {n: loss / 3 for n, loss in make_losses(net(x), labels, reduction).items()}
        total = sum(loss.mean() for loss in losses.values())
        total.backward(retain_graph=True)
        plain = gradients(net)
        optimizer.zero_grad()
        assert optimizer.backward(losses) == total
        ours = gradients(net)
        if index < 2 * first:
            assert difference(plain, ours) is None
            assert torch.cat(list(optimizer.task_weights.values())).unique().numel() == 1
        else:
            assert not torch.allclose(plain["trunk.0.weight"], ours["trunk.0.weight"])
            assert ours["heads.reg.weight"] is None
        optimizer.step()


def test_no_tensor_waits_for_the_garbage_collector(rule, device, dtype):
    """Cycles would keep the posteriors of many steps alive."""
    net = make_net(device, dtype)
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, 4)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        train(net, optimizer, 3)
        gc.collect()
        waiting = [item for item in gc.garbage if isinstance(item, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not waiting


# --- hard numbers --------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A trunk that passes its inputs through, so that features are known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


WIDE = 6
FEATURES = {
    "normal": lambda x: x,
    "constant": lambda x: torch.full_like(x, 0.7),
    "constant_datum": lambda x: x[:1].expand_as(x),
    "duplicated": lambda x: x[:, :1].expand_as(x),
    "zero": lambda x: torch.zeros_like(x),
    "one_datum": lambda x: x[:1],
    "fewer_data_than_dimensions": lambda x: x[:3],
    "tiny": lambda x: x * 1e-6,
    "huge": lambda x: x * 1e6,
    "mixed_scales": lambda x: x * torch.logspace(-6, 6, x.shape[1]).to(x),
}


@pytest.mark.filterwarnings("ignore::bayesagg.errors.NumericalWarning")
@pytest.mark.parametrize("kind", sorted(FEATURES))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("rule", "kwargs", "noise"),
    [
        ("paper", {}, 1.0),
        ("paper", {}, "learned"),
        ("paper", {"covariance": "full"}, 1.0),
        ("likelihood", {}, 1.0),
        ("likelihood", {}, "learned"),
    ],
    ids=["paper", "paper_learned", "paper_full", "likelihood", "likelihood_learned"],
)
def test_hard_features(rule, kwargs, noise, bias, kind, device, dtype):
    """No NaN and no infinity in anything that a run leaves behind."""
    net = make_net(device, dtype, trunk=lambda: Fixed(WIDE), width=WIDE, bias=bias)
    settings = {"bin": SAMPLED["bin"], "reg": {"noise_variance": noise}}
    if rule == "paper":
        kwargs = {"steps_per_epoch": 1, **kwargs}
    optimizer = wrap(net, "adam", rule, settings=settings, **kwargs)
    for index in range(4 + EPOCH * (rule == "likelihood")):
        x, labels = make_batch(device, dtype, seed=index, inputs=WIDE)
        x = FEATURES[kind](x)
        labels = {name: y[: len(x)] for name, y in labels.items()}
        optimizer.zero_grad()
        optimizer.step(make_losses(net(x), labels))
        assert_finite(snapshot(net, optimizer)["gradients"])
    assert_finite(snapshot(net, optimizer))


@pytest.mark.filterwarnings("ignore::bayesagg.errors.NumericalWarning")
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("readout", ["gradient", "posterior"])
@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
def test_saturated_logits(single, readout, right, size, rule, device):
    """Certain of everything, rightly or wrongly: labels, posterior and gradients stay finite."""
    dtype = torch.float32 if single else torch.float64
    outputs = {"bin": 2, "cls": 3}
    net = make_net(device, dtype, outputs=outputs, trunk=lambda: Fixed(WIDE), width=WIDE)
    with torch.no_grad():
        for head in net.heads.values():
            head.weight *= size
    settings = {name: {"readout": readout} for name in outputs}
    kwargs = {"steps_per_epoch": 1} if rule == "paper" else {"warmup": 1}
    optimizer = wrap(net, "adam", rule, settings=settings, **kwargs)
    for index in range(4):
        x, _ = make_batch(device, dtype, seed=index, inputs=WIDE)
        out = net(x)
        labels = {"bin": (out["bin"] > 0).to(x), "cls": out["cls"].argmax(1)}
        if not right:
            labels = {"bin": 1 - labels["bin"], "cls": out["cls"].argmin(1)}
        optimizer.zero_grad()
        optimizer.step(make_losses(out, labels))
        assert_finite(snapshot(net, optimizer)["gradients"])
    assert_finite(snapshot(net, optimizer))

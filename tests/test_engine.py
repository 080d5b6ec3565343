"""The engine over whole training runs: what it watches, what it leaves alone, what it keeps.

What belongs to one rule alone is in ``tests/rules``; what a step computes, there and in
``test_scalar.py``.
"""

import gc
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
from tests.helpers.training import make_engine, make_heads, run, train, train_step, wrap

# --- who takes part ------------------------------------------------------------------------------


ABSENT = pytest.mark.parametrize(
    "absent", [["reg"], ["bin"], ["cls"], ["reg", "cls"]], ids="-".join
)


@PHASES
@ABSENT
def test_absent_tasks_take_no_part(absent, steps, rule, like, batch):
    """No gradient and no say: whatever their heads are, the step is the same."""
    found = []
    for other in (0.0, 1.0):
        net = make_net(*like)
        optimizer = wrap(net, "sgd", rule)
        train(net, optimizer, steps)
        with torch.no_grad():
            for name in absent:
                net.heads[name].weight.add_(other)
        train_step(net, optimizer, batch, tasks=OUTPUTS.keys() - absent)
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
def test_tasks_that_are_always_absent_might_as_well_not_be_there(absent, rule, like):
    """The engine is one without them, and their heads stay as they are."""
    kept = [name for name in OUTPUTS if name not in absent]
    before, ends = snapshot(make_net(*like))["parameters"], []
    for left_out in ([], absent):
        net = make_net(*like)
        heads = {n: head for n, head in make_heads(net, rule).items() if n not in left_out}
        ends.append(run(net, rule, "momentum", EPOCH + 3, heads=heads, tasks=kept))
    torch.testing.assert_close(*(end["parameters"] for end in ends))
    for name, value in ends[0]["parameters"].items():
        if name.split(".")[1] in absent:
            assert torch.equal(before[name], value) and ends[0]["gradients"][name] is None


def test_a_task_keeps_its_evidence_while_it_has_no_labels(rule, like, batch):
    """It goes on where it was."""
    epoch = {"steps_per_epoch": 1, "settings": SAMPLED} if rule == "paper" else {}
    results = []
    for pause in (0, 2):
        net = plain_net(*like)
        still = torch.optim.SGD(net.parameters(), lr=0.0)  # nothing but the posterior moves
        optimizer = wrap(net, still, rule, **epoch)
        train(net, optimizer, EPOCH + 1)
        before = net.heads["reg"].weight.detach().clone()
        for _ in range(pause):
            train_step(net, optimizer, batch, tasks=["bin"])
        torch.testing.assert_close(net.heads["reg"].weight.detach(), before)
        train_step(net, optimizer, batch, tasks=["reg"])
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
            missing = torch.arange(len(x), device=device) % 3 == index % 3
            known = {name: labels[name][~missing]}
            out = {name: net(x[~missing])[name] if drop else net(x)[name][~missing]}
            gaps = missing if name == "cls" else missing[:, None]
            y = labels[name].masked_fill(gaps, -100 if name == "cls" else torch.nan)
            optimizer.zero_grad()
            losses = make_losses(out, known, "sum")
            optimizer.step(losses, targets=None if drop else {name: y})
        results.append(snapshot(net, optimizer))
    for key in ("parameters", "gradients"):
        torch.testing.assert_close(*(r[key] for r in results), **rounding(dtype))


# --- one of several, alone, apart ----------------------------------------------------------------


@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["quadrature", "sampled"])
def test_the_engine_alone_equals_the_wrapper(settings, base, rule, like):
    """Bit for bit, with an optimizer of one's own."""
    ours, net = run(make_net(*like), rule, base, 8, settings=settings), make_net(*like)
    optimizer = OPTIMIZERS[base](net.parameters())
    engine = make_engine(net, rule, settings=settings)

    def step(optimizer, losses, labels):
        assert not engine.backward(losses).requires_grad
        optimizer.step()
        engine.stepped()

    train(net, optimizer, 8, step=step)
    theirs = snapshot(net, optimizer)
    assert difference(ours["optimizer"].pop("bayesagg"), engine.get_extra_state()) is None
    for key in ("parameters", "gradients", "buffers", "optimizer"):
        assert difference(ours[key], theirs[key]) is None, key


@pytest.mark.parametrize(("base", "invariant"), [("adam", True), ("sgd", False)])
def test_the_engine_alone_meets_the_optimizer_of_its_heads(base, invariant, rule, like):
    """Whose step may depend on the gradient's scale or not; any other is of no interest."""
    net, stranger = make_net(*like), make_net(*like)
    engine = make_engine(net, rule)
    for a_net, met in ((stranger, False), (net, True)):
        optimizer = OPTIMIZERS[base](a_net.parameters())
        x, labels = make_batch(*like)
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

    def train_with(self, optimizer, steps):
        def step(optimizer, losses, labels):
            self.engine(losses).backward()
            optimizer.step()
            self.engine.stepped()

        train(self.net, optimizer, steps, step=step)


def test_an_engine_as_attribute_registers_no_parameters(rule, net):
    """Nothing appears twice; what it knows is in the module's state under its own name."""
    plain = set(net.state_dict())
    module = Module(net, rule)
    assert len(list(module.parameters())) == len(list(net.parameters()))
    assert set(module.state_dict()) == {f"net.{key}" for key in plain} | {"engine._extra_state"}
    assert set(net.state_dict()) == plain
    assert not list(module.engine.parameters()) and not list(module.engine.children())


def test_an_engine_as_attribute_is_saved_with_the_module(rule, like):
    """``state_dict`` and ``load_state_dict`` of the module carry the posterior, bit for bit."""
    stop = EPOCH + 2  # others: those of the wrapper, in test_optimizer_state.py
    modules = [Module(make_net(*like, seed=seed), rule) for seed in (0, 1)]
    optimizers = [OPTIMIZERS["adam"](module.parameters()) for module in modules]
    modules[0].train_with(optimizers[0], stop)
    file = io.BytesIO()
    torch.save([modules[0].state_dict(), optimizers[0].state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    modules[1].train_with(optimizers[1], range(20, 24))
    modules[1].load_state_dict(states[0])
    optimizers[1].load_state_dict(states[1])
    for module, optimizer in zip(modules, optimizers, strict=True):
        module.train_with(optimizer, range(stop, 8))
    states = [snapshot(m.net, o) for m, o in zip(modules, optimizers, strict=True)]
    assert_same(*states, ignore=["defaults"])
    assert difference(*[m.engine.get_extra_state() for m in modules]) is None


# --- heads ---------------------------------------------------------------------------------------


@PHASES
def test_a_sequence_of_heads_is_named_by_number(steps, rule, like):
    """And takes losses in the same order, equal to a mapping."""

    def by_number(optimizer, losses, labels):
        optimizer.step(dict(zip("012", losses.values(), strict=True)))

    def in_order(optimizer, losses, labels):
        assert list(optimizer.task_weights) == ["0", "1", "2"]
        optimizer.step(list(losses.values()))

    results = []
    for step in (by_number, in_order):
        net = make_net(*like)
        heads = list(make_heads(net, rule, **QUICK).values())
        results.append(run(net, rule, steps=steps + 1, heads=heads, step=step))
    assert_same(*results)


def test_heads_with_and_without_bias_go_together(rule, device, dtype):
    outputs = {"reg": 2, "bin": 1, "cls": 3}
    net = plain_net(device, dtype, outputs=outputs)
    heads = make_heads(net, rule)
    net.heads["bare"] = nn.Linear(WIDTH, 1, bias=False).to(net.trunk[0].weight)
    optimizer = wrap(net, "sgd", rule, heads={**heads, "bare": RegressionHead(net.heads["bare"])})
    for index in range(2 * EPOCH):
        x, labels = make_batch(device, dtype, seed=index, outputs=outputs)
        out = net(x)
        losses = make_losses({name: out[name] for name in labels}, labels)
        losses["bare"] = F.mse_loss(out["bare"], labels["reg"][:, :1])
        before = net.heads["bare"].weight.detach().clone()
        optimizer.step(losses)
        # Written by the posterior at the end of an epoch, or after every step.
        written = rule == "likelihood" or index % EPOCH == EPOCH - 1
        assert torch.equal(before, net.heads["bare"].weight) == (not written and index >= EPOCH)
    assert_finite(snapshot(net, optimizer))


class Other(nn.Module):
    """A linear layer of another library, with the parameters of one of torch's."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("key", ["input", "x"])
def test_heads_may_be_called_with_a_keyword(key, rule, like):
    """And be layers of another library, which names it otherwise: the same bits."""

    def keyword(net, x):
        h = net.trunk(x)
        return {name: head(**{key: h}) for name, head in net.heads.items()}

    nets = [plain_net(*like) for _ in range(2)]
    if key == "x":
        for name, head in nets[1].heads.items():
            nets[1].heads[name] = Other(head)
    ways = zip(nets, (None, keyword), strict=True)
    assert_same(*(run(net, rule, forward=f, settings=SAMPLED) for net, f in ways))


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
    epochs = {"steps_per_epoch": 2, "pretrain_epochs": first}
    kwargs = epochs if rule == "paper" else {"warmup": 2 * first}
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


def test_no_tensor_waits_for_the_garbage_collector(rule, net):
    """Cycles would keep the posteriors of many steps alive."""
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, 4)
    while gc.collect():  # what earlier tests left, and what its finalizers leave
        pass
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

"""What an engine watches, and what it leaves behind: neither a trace nor a hook."""

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from bayesagg.errors import CaptureError
from tests.helpers.data import make_losses
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import QUICK
from tests.helpers.states import assert_same, hooks_of, snapshot
from tests.helpers.training import train, train_step, wrap

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


def test_training_in_evaluation_mode_says_how(rule, net, batch):
    """Fine-tuning with the statistics of batch normalisation frozen: heads alone in training."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    x, labels = batch
    net.eval()
    with pytest.raises(CaptureError, match=r"evaluation mode.*train\(\) of the heads alone"):
        optimizer.step(make_losses(net(x), labels))
    net.heads.train()
    before = net.trunk[1].running_mean.clone()
    optimizer.step(make_losses(net(x), labels))
    assert torch.equal(net.trunk[1].running_mean, before)
    assert not optimizer.engine._capture.calls["reg"]


def test_replicas_of_data_parallel_are_refused(rule, net, batch):
    """Their hooks run in threads, on data of several devices; evaluation is left alone."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    replica = net.heads["reg"]._replicate_for_data_parallel()  # as on every device
    replica.weight, replica.bias = net.heads["reg"].weight, net.heads["reg"].bias
    with pytest.raises(CaptureError, match=r"'reg': its head is a replica of nn\.DataParallel"):
        replica(net.trunk(batch[0]))
    with torch.no_grad():
        replica(net.trunk(batch[0]))
    assert not optimizer.engine._capture.calls["reg"]


@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_gradients_per_example_are_refused(wrapped, rule, net, batch):
    """Opacus's promise would be void: nothing clips what a posterior learns, or adds noise."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    for parameter in net.parameters():
        parameter.grad_sample = None  # as Opacus sets
    with pytest.raises(CaptureError, match="per example, as by Opacus"):
        net(batch[0]) if wrapped == "before" else wrap(net, rule=rule, settings=QUICK)
    net.eval()(batch[0])
    assert not optimizer.engine._capture.calls["reg"]


def test_a_step_keeps_nothing_of_its_graph(rule, net, batch):
    """Features and outputs are freed with the last reference of the user."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    seen = []
    for module in (net.trunk, *net.heads.values()):
        module.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    for _ in range(5):
        train_step(net, optimizer, batch)
        assert len(seen) == 4
        assert [ref() for ref in seen] == [None] * 4
        seen.clear()


def same_step_after(use, rule, device, dtype, batch):
    """A step ends in the same bits after some other use of the network; whose optimizer it is."""
    x, labels = batch
    results = []
    for used in (False, True):
        net = plain_net(device, dtype)
        optimizer = wrap(net, rule=rule, settings=QUICK)
        train(net, optimizer, 4)
        if used:
            use(net)
        optimizer.step(make_losses(net(x), labels))
        results.append(snapshot(net, optimizer))
    assert_same(*results)
    return optimizer


def test_forward_passes_that_no_loss_needs(rule, device, dtype, batch):
    """They take no part in the step, which frees them."""
    seen = []

    def more(net):
        handle = net.trunk.register_forward_hook(lambda m, a, h: seen.append(weakref.ref(h)))
        for shift in (1, 2):
            net(batch[0] + shift)
        handle.remove()

    optimizer = same_step_after(more, rule, device, dtype, batch)
    assert [ref() for ref in seen] == [None] * 2
    assert not optimizer.engine._capture.calls["reg"]


def test_derivatives_by_torch_func_leave_no_trace(rule, device, dtype, batch):
    """Nor do they fail: a network in training may be differentiated by its inputs."""

    def differentiate(net):
        x = batch[0].detach().clone().requires_grad_()
        expected = torch.autograd.grad(net.eval()(x)["reg"].sum(), x)[0]
        net.train()
        slopes = torch.func.vmap(torch.func.grad(lambda one: net(one[None])["reg"].sum()))
        torch.testing.assert_close(slopes(x.detach()), expected)

    same_step_after(differentiate, rule, device, dtype, batch)


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


# --- life of a wrapper ---------------------------------------------------------------------------


def hooks(model):
    return sum(map(hooks_of, model.modules()))


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
    assert_same(snapshot(net)["parameters"], snapshot(other)["parameters"])
    del optimizer, other_optimizer
    gc.collect()
    assert hooks(other) == hooks(net) == 0


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_hooks_of_others_in_a_saved_model(wrapped, place, rule, net, batch, monkeypatch):
    """A hook of the user's gets the arguments of any hook.

    The process that loads a model counts its hooks from zero again, so that the user's may get a
    number that was the wrapper's.
    """
    optimizer = wrap(net, rule=rule)
    kind = "_forward_pre_hooks" if place == "before" else "_forward_hooks"
    number = next(iter(getattr(net.heads["reg"], kind)))
    other = saved_whole(net)
    wrappers = [optimizer, wrap(other, rule=rule)] if wrapped else [optimizer]
    monkeypatch.setattr(RemovableHandle, "next_id", number)
    head, seen = other.heads["reg"], []
    if place == "before":  # under a number that took keywords, and is given them still
        head.register_forward_pre_hook(lambda module, args, *_: seen.append(args))
    else:
        head.register_forward_hook(lambda module, args, output: seen.append(output))
    other(batch[0])
    assert len(seen) == len(wrappers[:1])

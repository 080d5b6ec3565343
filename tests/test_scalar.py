"""One scalar for any loop: what its backward pass does under factors, sums, repeats and failures.

That it equals ``step`` is in ``test_optimizer_protocol.py``; scalers: ``test_optimizer_loops.py``.
"""

import copy

import pytest
import torch
from torch import nn

from bayesagg.errors import LossError
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net
from tests.helpers.settings import GRADIENT, PHASES
from tests.helpers.states import assert_finite, assert_same, difference, gradients, snapshot
from tests.helpers.training import train, train_step, wrap


@pytest.fixture(params=[{}, GRADIENT], ids=["default", "gradient_readout"])
def settings(request):
    return request.param


@pytest.fixture
def start(rule, steps, settings, device, dtype):
    """Makes the same trained network and wrapper again and again."""
    net = make_net(device, dtype)
    optimizer = wrap(net, "sgd", rule, settings=settings)
    train(net, optimizer, steps)
    net.trunk[1].eval()  # every datum by itself

    def again():
        return copy.deepcopy((net, optimizer))

    return again


def times(factor, gradients):
    return {name: None if g is None else factor * g for name, g in gradients.items()}


def evidence_of(optimizer):
    """Gram matrices and their like, by place."""
    found = {}

    def walk(value, path):
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in pairs:
                walk(part, (*path, key))
        elif path[-1] in ("gram", "precision") or (path[-1] == "shift" and len(found) == 1):
            found[path] = value

    walk(optimizer.state_dict()["bayesagg"]["memory"], ())
    return found


@PHASES
def test_its_value_is_the_sum_and_nothing_is_learned_before_the_backward_pass(start, batch):
    x, labels = batch
    net, optimizer = start()
    before, losses = snapshot(net, optimizer), make_losses(net(x), labels)
    loss = optimizer.loss(losses)
    assert_same(before, snapshot(net, optimizer))
    assert loss.requires_grad and loss.dim() == 0
    torch.testing.assert_close(loss, sum(losses.values()), rtol=0, atol=0)
    assert torch.equal(loss, optimizer.engine(make_losses(net(x), labels), labels))
    assert_same(before, snapshot(net, optimizer))
    loss.backward()
    assert difference(before["optimizer"], snapshot(net, optimizer)["optimizer"]) is not None


@PHASES
@pytest.mark.parametrize("factor", [1024.0, 0.25, -1.0])
def test_a_factor_scales_every_gradient_and_nothing_else(factor, start, batch):
    x, labels = batch
    found = []
    for number in (1.0, factor):
        net, optimizer = start()
        optimizer.zero_grad()
        (number * optimizer.loss(make_losses(net(x), labels))).backward()
        found.append((gradients(net), optimizer.state_dict()["bayesagg"]))
    torch.testing.assert_close(found[1][0], times(factor, found[0][0]))
    assert difference(found[0][1], found[1][1]) is None


@PHASES
def test_other_terms_of_the_sum_have_their_own_gradient(start, batch):
    x, labels = batch
    found = []
    for penalised in (False, True):
        net, optimizer = start()
        optimizer.zero_grad()
        h = net.trunk(x)
        out = {name: head(h) for name, head in net.heads.items()}
        loss = optimizer.loss(make_losses(out, labels))
        penalty = h.square().mean() + net.trunk[0].weight.square().sum()
        own = torch.autograd.grad(penalty, list(net.trunk.parameters()), retain_graph=True)
        (loss + penalty if penalised else loss).backward()
        found.append([p.grad for p in net.trunk.parameters()])
    for plain, with_penalty, penalty in zip(*found, own, strict=True):
        torch.testing.assert_close(with_penalty, plain + penalty)


@PHASES
def test_a_second_pass_through_the_same_graph_teaches_nothing(start, batch):
    """Its gradients are those of the first."""
    x, labels = batch
    net, optimizer = start()
    optimizer.zero_grad()
    loss = optimizer.loss(make_losses(net(x), labels))
    loss.backward(retain_graph=True)
    once, state = gradients(net), optimizer.state_dict()
    loss.backward()
    torch.testing.assert_close(gradients(net), times(2, once))
    assert difference(state["bayesagg"], optimizer.state_dict()["bayesagg"]) is None


@PHASES
def test_gradients_can_be_asked_for(start, batch):
    """``torch.autograd.grad`` returns what ``backward`` accumulates, and teaches as much."""
    x, labels = batch
    (net, optimizer), (other_net, other) = start(), start()
    asked = torch.autograd.grad(optimizer.loss(make_losses(net(x), labels)), list(net.parameters()))
    other.zero_grad()
    other.loss(make_losses(other_net(x), labels)).backward()
    for gradient, parameter in zip(asked, other_net.parameters(), strict=True):
        if parameter.grad is not None:  # else of a head that is inferred: of no use to anybody
            torch.testing.assert_close(gradient, parameter.grad)
    ours, theirs = (o.state_dict()["bayesagg"] for o in (optimizer, other))
    assert difference(ours, theirs) is None


@PHASES
@pytest.mark.parametrize("way", ["backward", "grad"])
def test_second_derivatives_are_refused(way, start, batch):
    """The aggregate would be a constant in them; nothing has changed."""
    x, labels = batch
    net, optimizer = start()
    before = snapshot(net, optimizer)
    loss = optimizer.loss(make_losses(net(x), labels))
    with pytest.raises(LossError, match=r"create_graph=True.*constant"):
        if way == "backward":
            loss.backward(create_graph=True)
        else:
            torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    assert_same(before, snapshot(net, optimizer))


@PHASES
def test_evidence_counts_whether_or_not_a_step_follows(start, batch):
    """That of a batch whose step is skipped is that of one whose step is taken."""
    x, labels = batch
    found = []
    for step in (False, True):
        net, optimizer = start()
        optimizer.zero_grad()
        optimizer.backward(make_losses(net(x), labels))
        before = optimizer.state_dict()["bayesagg"]
        if step:
            optimizer.base_optimizer.step()
        assert difference(before, optimizer.state_dict()["bayesagg"]) is None
        found.append(evidence_of(optimizer))
    assert found[0]
    assert difference(*({str(k): v for k, v in part.items()} for part in found)) is None


@PHASES
def test_two_scalars_in_one_backward_pass(start, batch, device, dtype):
    """The evidence of both counts, as if they had been taken one after the other."""
    batches = [batch, make_batch(device, dtype, seed=51)]
    found = []
    for together in (False, True):
        net, optimizer = start()
        optimizer.zero_grad()
        scalars = []
        for x, labels in batches if together else batches[::-1]:  # autograd takes the last first
            loss = optimizer.loss({"reg": make_losses(net(x), labels)["reg"]})
            if not together:
                loss.backward()
            scalars.append(loss)
        if together:
            sum(scalars).backward()
        assert_finite(gradients(net))
        found.append(evidence_of(optimizer))
    one, other = found
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value)


@PHASES
def test_a_backward_pass_that_fails_teaches_nothing(start, batch):
    """And training goes on from there."""
    x, labels = batch
    (net, optimizer), (other_net, other) = start(), start()
    before = optimizer.state_dict()["bayesagg"]
    loss = optimizer.loss(make_losses(net(x), labels))

    def fail(gradient):
        raise KeyboardInterrupt

    handle = net.trunk[0].weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    handle.remove()
    assert difference(before, optimizer.state_dict()["bayesagg"]) is None
    train_step(net, optimizer, batch)
    train_step(other_net, other, batch)
    assert_same(snapshot(net, optimizer), snapshot(other_net, other))


# --- heads that the pass goes around -----------------------------------------------------------


@pytest.mark.parametrize("watcher", ["nobody", "output", "retained", "module", "other loss"])
def test_heads_are_passed_by_only_where_nobody_notices(watcher, monkeypatch, device, dtype):
    """The default rule: all else receives the same gradient, bit for bit."""
    x, labels = make_batch(device, dtype, seed=50)
    found = []
    for direct in (True, False):
        seen: list[int] = []
        net = make_net(device, dtype)
        optimizer = wrap(net, "sgd", "likelihood")
        train(net, optimizer, 4)
        optimizer.zero_grad()
        if watcher == "module":
            net.heads["reg"].register_full_backward_hook(lambda *_, to=seen: to.append(1))
        out = net(x)
        if watcher == "output":
            out["reg"].register_hook(lambda g, to=seen: to.append(1))
        elif watcher == "retained":
            out["reg"].retain_grad()
        losses = make_losses(out, labels)
        if watcher == "other loss":
            scale = torch.ones((), device=device, dtype=dtype, requires_grad=True)
            losses["reg"] = losses["reg"] * scale
        with monkeypatch.context() as patch:
            if not direct:
                patch.setattr("bayesagg.scalar._kept", lambda plan, batch: set(plan.gradients))
            optimizer.engine(losses).backward()
        if watcher == "retained":
            assert out["reg"].grad is not None
        if watcher == "other loss":
            assert scale.grad is not None
        found.append([seen, [p.grad for p in net.parameters()]])
    assert difference(*found) is None
    assert bool(seen) == (watcher in ("output", "module"))


# --- backward passes of others -------------------------------------------------------------------


@PHASES
def test_a_plain_backward_pass_is_as_if_nothing_were_watched(start, batch):
    """Gradients bit for bit, at parameters, features and inputs; and the next step is the same."""
    x, labels = batch

    def plain(net):
        net.zero_grad()
        inputs = x.clone().requires_grad_()
        features = net.trunk(inputs)
        features.retain_grad()
        out = {name: head(features) for name, head in net.heads.items()}
        sum(make_losses(out, labels).values()).backward()
        return [gradients(net), features.grad, inputs.grad]

    results = []
    for watched in (False, True):
        net, optimizer = start()
        if watched:
            bare = make_net(x.device, x.dtype)
            bare.load_state_dict(net.state_dict())
            bare.trunk[1].eval()
            assert difference(plain(net), plain(bare)) is None
        train_step(net, optimizer, batch)
        results.append(snapshot(net, optimizer))
    assert_same(*results)


# Heads that are set meanwhile forbid a second pass, as an optimizer's step does.
@PHASES
@pytest.mark.parametrize("settings", [GRADIENT], ids=["gradient_readout"])
def test_plain_and_aggregate_passes_through_one_graph(start, batch):
    """In either order each has its own gradients."""
    x, labels = batch
    found = []
    for order in ("plain", "ours", "plain_ours", "ours_plain"):
        net, optimizer = start()
        optimizer.zero_grad()
        losses = make_losses(net(x), labels)
        for kind in order.split("_"):
            loss = sum(losses.values()) if kind == "plain" else optimizer.loss(losses)
            loss.backward(retain_graph=True)
        found.append(gradients(net))
    plain, ours, *both = found
    for name, gradient in plain.items():
        for together in both:
            torch.testing.assert_close(together[name], gradient + ours[name])


def test_thousands_of_plain_passes_are_forgotten(rule, net, batch):
    """A model that is wrapped and then trained by hand keeps no graph of it alive."""
    optimizer = wrap(net, "sgd", rule)
    x, labels = batch
    for _ in range(1100):  # more than would be announced
        nn.functional.mse_loss(net.heads["reg"](net.trunk(x)), labels["reg"]).backward()
    assert sum(len(calls) for calls in optimizer.engine._capture.calls.values()) <= 1

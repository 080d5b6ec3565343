"""The paper's rule as an object: settings, its memory, and what the recorded runs do not cover."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BinaryHead, MulticlassHead, PaperRule, RegressionHead
from bayesagg.errors import CheckpointError
from bayesagg.posterior import augment
from bayesagg.rules.epochs import WARMUP, default_memory
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, QUICK, SAMPLED, WIDTH
from tests.helpers.states import snapshot
from tests.helpers.training import make_engine, train, train_step, wrap

AT_ONCE = PaperRule(pretrain_epochs=0)


class Run:
    """Regressions on features that stay as they are, and the rule's memory of them."""

    def __init__(self, rule=AT_ONCE, outputs=("a", "b"), steps_per_epoch=None, **settings):
        self.outputs = dict.fromkeys(outputs, 1)
        self.net = plain_net(outputs=self.outputs)
        heads = {n: RegressionHead(head, **settings) for n, head in self.net.heads.items()}
        base = torch.optim.SGD(self.net.parameters(), lr=0.0)
        kwargs = {"heads": heads, "steps_per_epoch": steps_per_epoch}
        self.optimizer = wrap(self.net, base, rule, **kwargs)
        self.memory = self.optimizer.engine._memory

    def step(self, index=0, size=8, *, tasks=("a", "b"), own=None):
        """The gradient at the features; ``own``: the task whose loss is not its likelihood."""
        x, labels = make_batch(seed=index, size=size, outputs=self.outputs)
        h = self.net.trunk(x)
        h.retain_grad()
        losses = {n: F.mse_loss(self.net.heads[n](h), labels[n]) for n in tasks}
        if own is not None:
            losses[own] = F.l1_loss(self.net.heads[own](h), labels[own])
        self.optimizer.step(losses, targets=None if own is None else {own: labels[own]})
        return h.grad

    def written(self, *args, **kwargs):
        """Heads that a step has set."""
        before = snapshot(self.net)["parameters"]
        self.step(*args, **kwargs)
        heads = self.net.heads.items()
        return {n for n, p in heads if not torch.equal(p.weight, before[f"heads.{n}.weight"])}


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrain_epochs": -1},
        {"pretrain_epochs": 1.0},
        {"pretrain_epochs": True},
        {"gradient_scale": "median"},
        {"covariance": "none"},
        {"max_data": 0},
        {"max_data": 2.5},
        {"max_data": 8, "covariance": "full"},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        PaperRule(**settings)


def test_it_weighs_out_of_the_box():
    run = Run(steps_per_epoch=1)
    assert run.memory.groups[0].s == (0.8, 0.8)
    assert run.memory.groups[0].inferred == ("a", "b")
    run.step()
    assert abs(float(run.optimizer.task_weights["a"]) - 0.5) > 0.001
    net = plain_net(outputs={"bin": 1, "cls": 3})
    heads = {"bin": BinaryHead(net.heads["bin"]), "cls": MulticlassHead(net.heads["cls"])}
    classified = make_engine(net, "paper", heads=heads)._memory
    assert [group.s for group in classified.groups] == [(0.05,), (0.05,)]
    assert not any(group.inferred for group in classified.groups)


def test_samples_without_effect():
    heads = {"b": BinaryHead(nn.Linear(3, 1), num_samples=64)}
    with pytest.warns(UserWarning, match="task 'b': num_samples has no effect"):
        BayesAgg(None, heads, rule="paper")


# --- losses that are not the likelihood ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:task 'b'")
def test_losses_that_are_not_the_likelihood_keep_their_gradient():
    alone, both = Run(), Run()
    x, labels = make_batch(size=8, outputs=both.outputs)
    h = both.net.trunk(x).detach().requires_grad_()
    F.l1_loss(both.net.heads["b"](h), labels["b"]).backward()
    expected = alone.step(tasks=("a",)) + h.grad
    torch.testing.assert_close(both.step(own="b"), expected)
    weights = both.optimizer.task_weights
    torch.testing.assert_close(weights, {n: torch.full((1,), 0.5) for n in "ab"}, check_dtype=False)
    mean = Run(PaperRule(pretrain_epochs=0, gradient_scale="mean"))
    torch.testing.assert_close(2 * mean.step(own="b"), expected)


@pytest.mark.filterwarnings("ignore:task 'b'")
def test_a_head_is_not_written_once_its_loss_was_another():
    run = Run(steps_per_epoch=2)
    assert run.written(0) == set()
    assert run.written(1, own="b") == {"a"}
    assert run.memory.spared() == ("a",)


# --- epochs --------------------------------------------------------------------------------------


def test_without_a_number_of_steps_epochs_end_by_hand(net):
    optimizer = wrap(net, rule="paper", settings=SAMPLED, steps_per_epoch=None)
    train(net, optimizer, 5)
    assert optimizer.engine._memory.epoch == 0
    optimizer.end_epoch()
    assert optimizer.engine._memory.epoch == 1
    optimizer.end_epoch()  # without a step in between
    assert optimizer.engine._memory.epoch == 1
    train(net, optimizer, 1)
    optimizer.end_epoch()
    assert optimizer.engine._memory.epoch == 2
    states = optimizer.engine._memory.states
    assert [state.full.count.tolist() for state in states] == [[6, 6], [6, 6], [6]]
    assert [state.running for state in states] == [None] * 3


def test_an_epoch_may_be_ended_early(net):
    """``end_epoch`` also starts the count of steps anew."""
    optimizer = wrap(net, rule="paper", settings=SAMPLED)
    train(net, optimizer, EPOCH - 1)
    optimizer.end_epoch()
    train(net, optimizer, EPOCH - 1)
    assert optimizer.engine._memory.epoch == 1
    train(net, optimizer, 1)
    assert optimizer.engine._memory.epoch == 2


@pytest.mark.parametrize("base", ["momentum", "adamw"])  # both decay weights
def test_the_posterior_sets_its_heads_alone(base, net):
    """Untouched by weight decay and momentum within an epoch, the ridge solution at its end."""
    settings = {**QUICK, "reg": {"prior_variance": 0.5, "noise_variance": 0.3}}
    optimizer = wrap(net, base, "paper", settings=settings)
    features = []
    net.trunk.register_forward_hook(lambda m, a, out: features.append(out.detach()))
    head = net.heads["reg"]
    train(net, optimizer, EPOCH)
    for epoch in (1, 2):
        features.clear()
        targets = []
        for index in range(EPOCH * epoch, EPOCH * (epoch + 1)):
            before = [p.detach().clone() for p in head.parameters()]
            like = next(net.parameters())
            targets.append(make_batch(like.device, like.dtype, seed=index)[1]["reg"])
            train_step(net, optimizer, index)
            unchanged = [torch.equal(b, p) for b, p in zip(before, head.parameters(), strict=True)]
            assert unchanged == [index % EPOCH != EPOCH - 1] * 2
            assert head.weight.grad is None and head.bias.grad is None
        h = augment(torch.cat(features), True)
        eye = torch.eye(h.shape[1], device=h.device, dtype=h.dtype)
        expected = torch.linalg.solve(h.mT @ h / 0.3 + eye / 0.5, h.mT @ torch.cat(targets) / 0.3)
        torch.testing.assert_close(
            torch.cat([head.weight, head.bias[:, None]], 1).detach(), expected.mT
        )


# --- without epochs ------------------------------------------------------------------------------


def test_three_arguments_infer_after_the_warm_up():
    net = plain_net()
    heads = {"reg": RegressionHead(net.heads["reg"]), "bin": BinaryHead(net.heads["bin"])}
    optimizer = wrap(net, "sgd", PaperRule(), heads=heads, steps_per_epoch=None)
    memory, head = optimizer.engine._memory, net.heads["reg"]
    for index in range(WARMUP + 2):
        train_step(net, optimizer, index, tasks=heads)
        weights = optimizer.task_weights["reg"].float()
        assert torch.allclose(weights, torch.full((2,), 1 / 4)) == (index < WARMUP)
        faded = memory.states[0].faded
        precision = faded.precision[0] + torch.eye(WIDTH + 1)
        mean = torch.linalg.solve(precision, faded.shift.mT).mT.to(head.weight)
        written = torch.cat([head.weight, head.bias[:, None]], 1).detach()
        assert torch.allclose(written, mean, atol=1e-5) == (index >= WARMUP)


def test_evidence_fades_by_the_datum():
    run, first, second = (Run(PaperRule()) for _ in range(3))
    for one, batches in ((run, ((0, 6), (1, 10))), (first, ((0, 6),)), (second, ((1, 10),))):
        for batch in batches:
            one.step(*batch)
    a, b = (one.memory.states[0].running for one in (first, second))
    count = torch.tensor(10.0).double()
    fading = torch.exp(-count / default_memory(WIDTH + 1, count))
    faded = run.memory.states[0].faded
    torch.testing.assert_close(faded.precision, fading * a.precision + b.precision)
    torch.testing.assert_close(faded.shift, fading * a.shift + b.shift)
    torch.testing.assert_close(run.memory.states[0].running.shift, a.shift + b.shift)


def test_evidence_of_an_absent_task_does_not_fade():
    run = Run(PaperRule())
    run.step()
    before = run.memory.states[0].faded
    for index in range(3):
        run.step(index, tasks=("a",))
    after = run.memory.states[0].faded
    torch.testing.assert_close(after.shift[1], before.shift[1])
    torch.testing.assert_close(after.precision[1], before.precision[0])
    assert after.count[0] > after.count[1] == before.count[1]


def test_the_first_end_of_an_epoch_makes_it_epochs():
    run = Run(PaperRule())
    for index in range(2):
        assert run.written(index) == set()
    running = run.memory.states[0].running
    assert run.memory.fades and run.memory.pretraining
    assert set(run.memory.end_epoch()) == {"a", "b"}
    assert not run.memory.fades and not run.memory.pretraining
    torch.testing.assert_close(run.memory.states[0].full.precision, running.precision)
    assert run.written(2) == set() and run.memory.states[0].faded is None


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_state_of_other_settings_is_refused():
    """Of noise that is learned where it is fixed; moments may be found in another way."""

    def engine(noise="learned", **settings):
        net = plain_net()
        settings = {"reg": {"noise_variance": noise}, "bin": settings}
        return net, make_engine(net, "paper", settings=settings)

    net, saved = engine()
    x, labels = make_batch()
    saved.backward(make_losses(net(x), labels))
    _, fixed = engine(1.0)
    with pytest.raises(CheckpointError, match="noise variance"):
        fixed.set_extra_state(saved.get_extra_state())
    _, other = engine(moments="monte_carlo", num_samples=8)
    other.set_extra_state(saved.get_extra_state())
    assert other._memory.draws == 1

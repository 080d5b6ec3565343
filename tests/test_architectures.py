"""Networks of every build: towers, several backbones, siamese heads, frozen parts.

Heads that read different tensors are of the default rule alone: the paper's needs one common h, and
says so (``test_bad_input.py``). All else runs under both.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.data import make_batch
from tests.helpers.nets import Net, make_net, plain_net, plain_trunk
from tests.helpers.settings import EPOCH, HEADS, OUTPUTS, PHASES, WIDTH
from tests.helpers.states import assert_finite, assert_same, difference, snapshot
from tests.helpers.training import make_heads, run, train, train_step, wrap

# --- towers, widths, backbones -------------------------------------------------------------------


def test_a_tower_is_its_last_layer(device, dtype):
    """Bit for bit, whichever of the two is handed over; the rest of it is trained as a trunk."""
    results = []
    for whole in (True, False):
        net = plain_net(device, dtype, towers=True)
        heads = {n: HEADS[n](tower if whole else tower[-1]) for n, tower in net.heads.items()}
        results.append(run(net, "likelihood", "sgd", 6, heads=heads, shared_rep_hook=None))
        for tower in net.heads.values():
            assert all(p.grad is None for p in tower[-1].parameters())
            assert all(p.grad.any() for p in tower[:-1].parameters())
    assert_same(*results)


def test_networks_that_share_nothing_are_trained_as_by_wrappers_of_their_own(device, dtype):
    """Two backbones of different widths under one wrapper, or one each."""

    def networks():
        return [
            make_net(device, dtype, seed=seed, outputs={name: OUTPUTS[name]}, width=width)
            for seed, (name, width) in enumerate({"reg": 4, "bin": 7, "cls": 4}.items())
        ]

    def all_of(both, x):
        return {name: z for net in both for name, z in net(x).items()}

    together, apart = nn.ModuleList(networks()), networks()
    heads = {name: HEADS[name](net.heads[name]) for net in together for name in net.heads}
    settings = {"keep_length": False, "shared_rep_hook": None}  # lengths are those of all gradients
    how = ("likelihood", "momentum", EPOCH + 4)
    run(together, *how, forward=all_of, heads=heads, **settings)
    for ours, net in zip(together, apart, strict=True):
        theirs = run(net, *how, **settings)
        for key in ("parameters", "gradients"):
            torch.testing.assert_close(snapshot(ours)[key], theirs[key])


class Between(Net):
    """Something lies between the module that is named and the heads, which share its output."""

    def __init__(self, change):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(trunk=plain_trunk)
        self.change = change

    def forward(self, x):
        h = self.change(self.trunk(x))
        return {name: head(h) for name, head in self.heads.items()}


@pytest.mark.parametrize("hook", ["trunk", "none", "a stranger"])
def test_the_module_that_is_named_does_not_matter(hook, rule, device, dtype):
    """What the heads receive does: the same bits."""
    results = []
    for named in ("none", hook):
        net = Between(lambda h: torch.relu(h) + 0.5).to(device, dtype)
        module = {"trunk": net.trunk, "none": None, "a stranger": nn.Tanh()}[named]
        results.append(run(net, rule, steps=5, shared_rep_hook=module))
    assert_same(*results, ignore=["hooks", "training"])


def test_a_module_that_returns_a_tuple_may_be_named(rule, device, dtype):
    """As recurrent layers do."""
    net = Between(lambda pair: pair[0]).to(device, dtype)
    net.trunk = nn.GRU(5, WIDTH, batch_first=True).to(device, dtype)
    assert_finite(run(net, rule, steps=5))
    assert net.trunk.weight_ih_l0.grad.any()


# --- heads that run several times, or not at all -------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["recovered", "targets"])
def test_a_siamese_head_is_a_larger_batch(given, rule, like):
    """Two calls of the network, whose outputs share their losses, are one call on both batches."""

    def twice(net, x):
        parts = [net(part) for part in x.chunk(2)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def step(optimizer, losses, labels):
        optimizer.step(losses, targets=labels if given else None)

    ends = [run(plain_net(*like), rule, "sgd", forward=f, step=step) for f in (None, twice)]
    for key in ("parameters", "gradients"):
        torch.testing.assert_close(*(end[key] for end in ends))


def test_some_heads_run_more_often_than_others(device, dtype):
    """A regression on pairs of inputs beside a class of the first of each."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, "adam", "likelihood")
    for index in range(EPOCH + 3):
        x, labels = make_batch(device, dtype, seed=index)
        h, other = net.trunk(x), net.trunk(x.flip(0))
        reg = net.heads["reg"]
        losses = {
            "reg": F.mse_loss(torch.cat([reg(h), reg(other)]), labels["reg"].repeat(2, 1)),
            "cls": F.cross_entropy(net.heads["cls"](h), labels["cls"]),
        }
        optimizer.zero_grad()
        optimizer.step(losses)
        assert_finite(snapshot(net, optimizer))
        assert net.trunk[0].weight.grad.any()


@PHASES
def test_a_head_that_does_not_run_is_left_alone(steps, rule, like, batch):
    """It neither runs nor has a loss; as one that runs without."""

    def some(net, x):
        h = net.trunk(x)
        return {name: net.heads[name](h) for name in ("reg", "bin")}

    results = []
    for forward in (None, some):
        net = plain_net(*like)
        optimizer = wrap(net, "sgd", rule)
        train(net, optimizer, steps)
        before = net.heads["cls"].weight.detach().clone()
        train_step(net, optimizer, batch, forward=forward, tasks=("reg", "bin"))
        assert torch.equal(net.heads["cls"].weight, before)
        results.append(snapshot(net, optimizer))
    assert_same(*results)


# --- frozen parts, strangers ---------------------------------------------------------------------


@pytest.mark.parametrize("part", ["both", "weight", "bias"])
def test_a_frozen_head_is_never_written(part, rule, like, batch):
    """What of it is frozen stays as it is; its loss reaches the trunk, and the others go on."""
    net = plain_net(*like)
    for name, p in net.heads["reg"].named_parameters():
        p.requires_grad_(part not in ("both", name))
    optimizer = wrap(net, "sgd", rule)
    start = snapshot(net)["parameters"]
    train(net, optimizer, 2 * EPOCH)
    for name, p in net.named_parameters():
        assert torch.equal(p, start[name]) != p.requires_grad
    train_step(net, optimizer, batch, tasks=["reg"])
    assert net.trunk[0].weight.grad.any()
    assert_finite(snapshot(net, optimizer))


def test_a_head_may_be_frozen_and_unfrozen(rule, device, dtype):
    net = plain_net(device, dtype)
    optimizer = wrap(net, "sgd", rule)
    head = net.heads["reg"]
    train(net, optimizer, 2 * EPOCH)
    head.requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    train(net, optimizer, range(2 * EPOCH, 3 * EPOCH))
    assert difference(before, head.state_dict()) is None
    head.requires_grad_(True)
    train(net, optimizer, range(3 * EPOCH, 4 * EPOCH))
    assert not torch.equal(before["weight"], head.weight)


def test_a_frozen_trunk_leaves_the_heads_to_learn(rule, device, dtype):
    net = plain_net(device, dtype)
    net.trunk.requires_grad_(False)
    optimizer = wrap(net, "sgd", rule)
    before = snapshot(net)["parameters"]
    train(net, optimizer, 2 * EPOCH)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("trunk")


def test_a_parametrized_head_keeps_its_own_gradient(device, dtype):
    """Also where it was parametrized after it was wrapped: its weights cannot be written."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, "sgd", "likelihood")
    train(net, optimizer, EPOCH + 1)
    nn.utils.parametrizations.weight_norm(net.heads["reg"])
    optimizer.add_param_group(
        {"params": [p for n, p in net.heads["reg"].named_parameters() if "original" in n]}
    )
    train(net, optimizer, range(EPOCH + 1, EPOCH + 4))
    assert all(p.grad is not None for p in net.heads["reg"].parameters())
    assert_finite(snapshot(net, optimizer))


def test_a_probe_sends_nothing_back(like):
    """A head on detached features learns, and the trunk does not hear of it."""

    def detached(net, x):
        h = net.trunk(x)
        return {n: head(h.detach() if n == "reg" else h) for n, head in net.heads.items()}

    found, how = [], {"forward": detached, "keep_length": False}
    for probed in (False, True):
        net = plain_net(*like)
        heads = make_heads(net, "likelihood")
        if not probed:
            del heads["reg"]
        end = run(net, "likelihood", "sgd", 5, heads=heads, tasks=heads, **how)
        found.append([value for name, value in end["gradients"].items() if "trunk" in name])
    torch.testing.assert_close(*found)


def test_a_head_that_the_optimizer_lacks_is_announced(rule, device, dtype):
    net = plain_net(device, dtype)
    some = [p for n, p in net.named_parameters() if not n.startswith("heads.bin")]
    with pytest.warns(UserWarning, match="task 'bin': the optimizer does not have"):
        wrap(net, torch.optim.SGD(some, lr=0.1), rule)
    net.heads["bin"].requires_grad_(False)  # on purpose
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(net, torch.optim.SGD(some, lr=0.1), rule)

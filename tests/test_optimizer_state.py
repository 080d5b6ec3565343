"""The wrapper is saved, loaded and copied as any optimizer."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from tests.helpers.nets import make_net
from tests.helpers.settings import OPTIMIZERS, QUICK, RULES, SAMPLED
from tests.helpers.states import assert_same, difference, snapshot, tensors_of
from tests.helpers.training import train, wrap

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


def saved_and_loaded(state):
    """Through a file, as a checkpoint is read by default: no arbitrary objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def adafactor(net):
    """Which has other entries for vectors, and a setting that is negative."""
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("before torch 2.5")
    return torch.optim.Adafactor(net.parameters(), lr=1e-3)


# Steps before the stop: within pre-training and an epoch, and at the end of each.
RESUMED = [
    *((rule, "adam", QUICK, stop, {}) for rule in RULES for stop in (1, 3, 6)),
    *((rule, base, QUICK, 5, {}) for rule in RULES for base in (*BASES, adafactor)),
    *((rule, "adam", settings, 5, {}) for rule in RULES for settings in SETTINGS.values()),
    *(
        (rule, "momentum", SAMPLED, 4, kwargs)
        for rule, own in ARGUMENTS.items()
        for kwargs in ({"seed": 7}, {"dtype": torch.float32}, *own)
    ),
]


@pytest.mark.filterwarnings("ignore:.*LBFGS")  # heads that the posterior sets
@pytest.mark.parametrize(("rule", "base", "settings", "stop", "kwargs"), RESUMED)
def test_a_loaded_run_goes_on_in_the_same_bits(rule, base, settings, stop, kwargs, like):
    """Stopping after ``stop`` steps and going on from the file."""
    closure = base == "lbfgs"

    def start(seed):
        net = make_net(*like, seed=seed)
        own = base(net) if callable(base) else base
        return net, wrap(net, own, rule, settings=settings, **kwargs)

    net, optimizer = start(0)
    train(net, optimizer, stop, closure=closure)
    file = saved_and_loaded({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, range(stop, 8), closure=closure)
    other_net, other = start(1)
    train(other_net, other, range(20, 22), closure=closure)  # all of which is to be overwritten
    other_net.load_state_dict(file["net"])
    other.load_state_dict(file["optimizer"])
    train(other_net, other, range(stop, 8), closure=closure)
    # torch itself adds an entry to the defaults on loading
    assert_same(snapshot(net, optimizer), snapshot(other_net, other), ignore=["defaults"])


@pytest.mark.parametrize("scheduled", ["before", "after"])
def test_a_scheduler_that_comes_or_goes_with_a_checkpoint(scheduled, rule, net):
    """It leaves settings of its own in the groups."""
    optimizer = wrap(net, rule=rule)
    other = wrap(make_net(seed=1), rule=rule)
    lr_scheduler.ExponentialLR(optimizer if scheduled == "before" else other, 0.9)
    train(net, optimizer, 2)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


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


def test_states_are_copies_of_the_posterior(rule, net, device, dtype):
    """Later training reaches neither into a state that was taken nor into one that was loaded."""
    optimizer = wrap(net, rule=rule, settings=QUICK)
    train(net, optimizer, 4)
    state = optimizer.state_dict()["bayesagg"]
    copied = copy.deepcopy(state)
    other_net = make_net(device, dtype, seed=1)
    other = wrap(other_net, rule=rule, settings=QUICK)
    other.load_state_dict({**other.base_optimizer.state_dict(), "bayesagg": state})
    for one, wrapper in ((net, optimizer), (other_net, other)):
        train(one, wrapper, range(4, 9))
        assert difference(copied, state) is None
        assert difference(state, wrapper.state_dict()["bayesagg"]) is not None


def test_a_state_of_the_wrapper_has_the_parts_of_any_optimizer(rule, net):
    """Plain tools find ``state`` and ``param_groups``, and the base loads them."""
    optimizer = wrap(net, "adam", rule)
    train(net, optimizer, 2)
    state = optimizer.state_dict()
    assert set(state) >= {"state", "param_groups"}
    plain = torch.optim.Adam(net.parameters())
    plain.load_state_dict({key: state[key] for key in ("state", "param_groups")})
    assert len(plain.state) == len(optimizer.state)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


# torch's LBFGS does not survive a copy.
@pytest.mark.parametrize(
    ("kind", "base", "order"),
    [
        *(("deepcopy", base, "model_first") for base in PLAIN_BASES),
        *((kind, "adam", "optimizer_first") for kind in COPIES),
        ("pickle", "momentum", "model_first"),
    ],
)
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


def test_step_hooks_work_in_a_copy(rule, net):
    """Hooks themselves are not copied, as with any optimizer, but can be registered."""
    _, optimizer = copy.deepcopy((net, wrap(net, rule=rule)))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    optimizer.step()
    assert seen == [1]

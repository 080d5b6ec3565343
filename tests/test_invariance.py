"""Which optimizers take the same step for a gradient of any scale."""

import copy
import inspect
import warnings

import pytest
import torch
from torch.optim import Optimizer

from bayesagg.invariance import step_is_invariant
from tests.helpers.nets import make_net
from tests.helpers.states import assert_same, difference, snapshot
from tests.helpers.training import train, wrap

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def parameters():
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2, 2))]


class Frozen(Optimizer):
    """Takes steps of no length."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        pass


class Sign(Frozen):
    """As Lion: moves by the sign alone."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


class Awkward(Sign):
    """Cannot be made anew from its groups."""

    def __init__(self, params, secret):
        super().__init__(params)


class Around(Optimizer):
    """Has another inside, whose groups and state are its own, and no defaults."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


# How the optimizers of torch behave under gradients of the size of those of networks.
KNOWN = {
    **{name: True for name in ("Adam", "AdamW", "Adamax", "NAdam", "Adagrad", "RMSprop", "Rprop")},
    **{name: False for name in ("SGD", "ASGD", "LBFGS", "SparseAdam")},
}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_optimizers_of_torch(name):
    kind = getattr(torch.optim, name)
    assert step_is_invariant(kind(parameters(), lr=1e-3)) == KNOWN[name]


def test_every_optimizer_of_torch_has_an_answer():
    """Also those of later versions."""
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer:
            optimizer = kind(parameters(), lr=1e-3)
            assert isinstance(step_is_invariant(optimizer), bool), name


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: Adam(p, weight_decay=1e-6), True),
        (lambda p: Adam(p, weight_decay=0.1), False),  # part of the gradient, and large beside it
        (lambda p: AdamW(p, weight_decay=0.1), True),  # none of the gradient
        (lambda p: Adam(p, lr=0.0), True),  # where a schedule starts
        (lambda p: Adam(p, lr=torch.tensor(1e-3)), True),
        (lambda p: Adam(p, lr=10.0), True),
        (lambda p: Adam(p, amsgrad=True), True),
        (lambda p: Adam(p, eps=1e-2), False),  # which then is the scale
        (lambda p: SGD(p, lr=0.0), False),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), False),
        (lambda p: Sign(p), True),
        (lambda p: Frozen(p), False),
        (lambda p: Awkward(p, 1), False),
        (lambda p: Around(Adam(p)), True),
        (lambda p: Around(SGD(p)), False),
    ],
)
def test_settings_count(make, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step_is_invariant(make(parameters())) == expected


def test_the_first_groups_settings_count():
    params = parameters()
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    assert not step_is_invariant(Adam(groups))
    groups = [{"params": params[1:]}, {"params": params[:1], "weight_decay": 0.1}]
    assert step_is_invariant(Adam(groups))


def test_the_optimizer_itself_is_left_alone():
    params = parameters()
    optimizer = Adam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy((params, [p.grad for p in params], optimizer.state_dict()))
    generator = torch.get_rng_state()
    step_is_invariant(optimizer)
    after = (params, [p.grad for p in params], optimizer.state_dict())
    assert difference(list(before), list(after)) is None
    assert torch.equal(generator, torch.get_rng_state())


def test_one_that_has_another_inside_is_as_that(rule):
    """In the same bits, and from its own checkpoint."""
    ends = []
    for around in (True, False):
        net = make_net()
        base = Adam(net.parameters(), lr=1e-2)
        optimizer = wrap(net, Around(base) if around else base, rule)
        train(net, optimizer, 5)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(net, optimizer, range(5, 8))
        ends.append(snapshot(net)["parameters"])
    assert_same(*ends)

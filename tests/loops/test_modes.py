"""Optimizers that have weights for training and others for evaluation, as schedule-free ones."""

import pytest
import torch

from bayesagg.invariance import step_is_invariant
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, FOREVER, QUICK
from tests.helpers.states import difference, snapshot
from tests.helpers.training import make_engine, train, wrap


class ScheduleFree(torch.optim.Optimizer):
    """SGD of Defazio et al. (2024), or of the sign of the gradient: weights between two others."""

    def __init__(self, params, lr=0.05, beta=0.9, sign=False):
        super().__init__(params, {"lr": lr, "beta": beta, "sign": sign})
        self.mode, self.steps = "eval", 0

    @torch.no_grad()
    def _to(self, mode, weight):
        for group in self.param_groups if mode != self.mode else ():
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight(group["beta"]))
        self.mode = mode

    def train(self):
        self._to("train", lambda beta: 1 - beta)

    def eval(self):
        self._to("eval", lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def step(self, closure=None):
        if self.mode != "train":
            raise RuntimeError("call train() first")
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                z, beta = self.state[p].setdefault("z", p.clone()), group["beta"]
                x = p.lerp(z, 1 - 1 / beta)
                z.sub_(p.grad.sign() if group["sign"] else p.grad, alpha=group["lr"])
                p.copy_(x.lerp_(z, 1 / self.steps).lerp_(z, 1 - beta))


def heads_of(net):
    return {name: snapshot(head)["parameters"] for name, head in net.heads.items()}


def moved(net, turn):
    """Which parts a change of mode moves."""
    before, trunk = heads_of(net), snapshot(net.trunk)["parameters"]
    turn()
    found = {n for n, head in heads_of(net).items() if difference(before[n], head) is not None}
    return found | ({"trunk"} if difference(trunk, snapshot(net.trunk)["parameters"]) else set())


def started(rule, **kwargs):
    net = plain_net()
    optimizer = wrap(net, ScheduleFree(net.parameters()), rule, settings=QUICK, **kwargs)
    optimizer.train()
    train(net, optimizer, 3 * EPOCH)
    return net, optimizer


# Classifications keep their own gradient under the paper's rule.
FREE = {"likelihood": {"trunk"}, "paper": {"trunk", "bin", "cls"}}


def test_heads_that_a_posterior_sets_have_one_weight(rule):
    """An average of heads from before the posterior set them would be no head of these features."""
    net, optimizer = started(rule)
    for turn in (optimizer.eval, optimizer.train, optimizer.eval):
        assert moved(net, turn) == FREE[rule]


def test_a_resumed_run_knows_them_before_its_first_step(rule):
    net, optimizer = started(rule)
    other = plain_net()
    again = wrap(other, ScheduleFree(other.parameters()), rule, settings=QUICK)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(optimizer.state_dict())
    again.base_optimizer.mode = "train"
    assert moved(other, again.eval) == FREE[rule]


def test_in_linear_scalarization_the_optimizer_has_all(rule):
    net, optimizer = started(rule, **FOREVER[rule])
    assert moved(net, optimizer.eval) == {"trunk", "reg", "bin", "cls"}


def test_a_change_that_fails_leaves_them(rule, monkeypatch):
    net, optimizer = started(rule)

    def fails(self):
        ScheduleFree.train(self)
        self._to("eval", lambda beta: 1 - 1 / beta)
        raise KeyError("ema")

    monkeypatch.setattr(type(optimizer.base_optimizer), "eval", fails)

    def turn():
        with pytest.raises(KeyError):
            optimizer.eval()

    assert moved(net, turn) == FREE[rule]


def test_other_optimizers_have_one_mode(rule):
    net = plain_net()
    optimizer = wrap(net, "adam", rule)
    train(net, optimizer, EPOCH)
    assert moved(net, optimizer.eval) == moved(net, optimizer.train) == set()


def test_an_engine_by_itself_says_what_happens(rule):
    """Once; nobody but the wrapper is asked to change the mode."""
    net = plain_net()
    engine, base = make_engine(net, rule), ScheduleFree(net.parameters())
    base.train()
    x, labels = make_batch()
    with pytest.warns(UserWarning, match="ScheduleFree has other weights for eval") as caught:
        for _ in range(2):
            engine(make_losses(net(x), labels)).backward()
            base.step()
    assert len(caught) == 1


@pytest.mark.parametrize("sign", [False, True])
def test_the_length_is_free_where_the_step_does_not_depend_on_it(sign):
    """Under the default rule; the optimizer is asked in training mode."""
    net = plain_net()
    base = ScheduleFree(net.parameters(), sign=sign)
    assert step_is_invariant(base) == sign
    optimizer = wrap(net, base, "likelihood")
    assert optimizer.engine._memory.invariant == sign

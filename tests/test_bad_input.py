"""Bad input of every kind: its own error, a message that helps, and nothing has changed.

A case prepares a situation and returns two calls: the bad one, and a good one that goes on from
there. Everything is run twice, with the bad call and without: afterwards both must agree in every
bit. Checkpoints are in ``test_checkpoint.py``.
"""

import copy
import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper
from bayesagg.errors import CaptureError, FeatureError, LossError
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import Net, make_net
from tests.helpers.settings import QUICK, RULES
from tests.helpers.states import assert_finite, assert_same, difference, snapshot
from tests.helpers.training import train, wrap


def nothing() -> None:
    """Where there is no sense in going on."""


@dataclass
class Bench:
    """A network in training, its optimizer and the next batch."""

    net: nn.Module
    optimizer: BayesAggWrapper
    rule: str
    x: torch.Tensor
    labels: dict[str, torch.Tensor]

    def losses(self, out: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Of a forward pass, made here if there was none."""
        out = self.net(self.x) if out is None else out
        return make_losses(out, self.labels)

    def step(self, *args: Any, **kwargs: Any) -> Callable[[], Any]:
        """A call for later."""
        return functools.partial(self.optimizer.step, *args, **kwargs)

    def go_on(self) -> None:
        """One good step from a new forward pass."""
        self.optimizer.step(self.losses())

    def use(self, net: nn.Module) -> None:
        """Another network, wrapped anew."""
        self.net = net.to(self.x)
        self.optimizer = wrap(self.net, "momentum", self.rule, settings=QUICK)


CASES: list[Any] = []
PHASES = {"pretraining": 1, "after": 4, "accumulating": 4}  # steps that were taken before


def bad(
    error: type[Exception],
    *says: str,
    phases: tuple[str, ...] = tuple(PHASES),
    rules: tuple[str, ...] = tuple(RULES),
    **variants: Any,
) -> Callable[..., Any]:
    """Register a case, or one for each variant (name → further argument)."""

    def register(prepare: Callable[..., Any]) -> Callable[..., Any]:
        ways = {f"-{name}": functools.partial(prepare, value=v) for name, v in variants.items()}
        for (variant, way), phase, rule in itertools.product(
            (ways or {"": prepare}).items(), phases, rules
        ):
            name = f"{prepare.__name__}{variant}-{phase}-{rule}"
            CASES.append(pytest.param(error, says, way, phase, rule, id=name))
        return prepare

    return register


# --- losses; others, and targets, are in ``reading/test_bad_losses.py`` --------------------------


@bad(LossError, "task 'bin'", "not finite", nan=torch.nan, inf=torch.inf)
def loss_is_not_finite(bench, value):
    losses = bench.losses()
    return bench.step({**losses, "bin": losses["bin"] * value}), bench.step(losses)


@bad(LossError, "task 'reg'", "last forward pass", all=["reg", "bin", "cls"], one=["reg"])
def loss_is_of_a_forward_pass_before_the_last_step(bench, value):
    old = bench.losses()
    bench.optimizer.step(old)
    new = bench.losses()
    return bench.step({**new, **{name: old[name] for name in value}}), bench.step(new)


@bad(
    LossError,
    "losses",
    "pass|Use",
    mapping=lambda losses: {},
    empty=lambda losses: [],
    few=lambda losses: [losses["reg"]],
    sum=lambda losses: sum(losses.values()),
    iterator=lambda losses: iter(losses.values()),
)
def losses_are_no_collection(bench, value):
    losses = bench.losses()
    return bench.step(value(losses)), bench.step(losses)


@bad(LossError, "task 'reg'", "tensors")
def loss_is_a_number(bench):
    losses = bench.losses()
    return bench.step({**losses, "reg": 1.0}), bench.step(losses)


# --- forward passes ------------------------------------------------------------------------------


@bad(CaptureError, "task 'reg': no forward pass", "Run the model that was wrapped")
def forward_pass_is_missing(bench):
    losses = bench.losses()
    bench.optimizer.step(losses)
    return bench.step(losses), bench.go_on


@bad(LossError, "task 'reg'", "does not require gradients", "detached", r"torch\.no_grad")
def forward_pass_without_gradients(bench):
    bench.optimizer.step(bench.losses())
    with torch.no_grad():
        losses = bench.losses()
    return bench.step(losses), bench.go_on


@bad(CaptureError, "no forward pass", "training mode")
def forward_pass_in_evaluation_mode(bench):
    bench.optimizer.step(bench.losses())
    bench.net.eval()
    losses = bench.losses()
    bench.net.train()
    return bench.step(losses), bench.go_on


@bad(CaptureError, "no forward pass", phases=("after",))
def heads_are_applied_functionally(bench):
    bench.optimizer.step(bench.losses())
    h = bench.net.trunk(bench.x)
    heads = bench.net.heads.items()
    out = {name: F.linear(h, head.weight, head.bias) for name, head in heads}
    return bench.step(bench.losses(out)), bench.go_on


@bad(CaptureError, r"torch\.compile", "before it was wrapped.*: wrap first", phases=("after",))
def model_was_compiled_before_it_was_wrapped(bench):
    """Hooks that come after the first call of compiled code never run."""
    bench.net = make_net(bench.x.device, bench.x.dtype)
    compiled = torch.compile(bench.net, backend="eager")
    compiled(bench.x)
    bench.use(bench.net)
    late: list[int] = []
    handle = bench.net.heads["reg"].register_forward_hook(lambda *_: late.append(1))
    losses = bench.losses(compiled(bench.x))
    handle.remove()
    torch.compiler.reset()
    if late:
        pytest.skip("this PyTorch compiles anew where hooks were added")
    return bench.step(losses), bench.go_on


@bad(CaptureError, "task 'bin': no forward pass")
def head_did_not_run(bench):
    old = bench.losses()
    bench.optimizer.step(old)
    h = bench.net.trunk(bench.x)
    new = bench.losses({name: bench.net.heads[name](h) for name in ("reg", "cls")})
    return bench.step({**new, "bin": old["bin"]}), bench.step(new)


class Apart(Net):
    """Every head receives the trunk's output in its own way."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.trunk(x)
        return {name: head(self.change(h)) for name, head in self.heads.items()}


@bad(
    CaptureError,
    "tasks 'reg' and '(bin|cls)'.*different tensors",
    "default rule",
    rules=("paper",),
    activation=torch.relu,
    copy=torch.clone,
    dropout=F.dropout,
)
def heads_do_not_read_one_tensor(bench, value):
    bench.use(Apart(value))
    return bench.step(bench.losses()), nothing


@bad(CaptureError, "different tensors", rules=("paper",))
def losses_are_of_two_forward_passes(bench):
    old, new = bench.losses(), bench.losses()
    return bench.step({**new, "reg": old["reg"]}), bench.step(new)


@bad(FeatureError, "in place", "out-of-place")
def features_change_in_place(bench):
    h = bench.net.trunk(bench.x)
    out = {}
    for name, head in bench.net.heads.items():
        out[name] = head(h)
        if name == "bin":
            h.mul_(2)
    return bench.step(bench.losses(out)), bench.go_on


@bad(FeatureError, "task 'bin'", "in place", "out-of-place")
def output_changes_in_place(bench):
    out = bench.net(bench.x)
    out["bin"].mul_(2)
    return bench.step(bench.losses(out)), bench.go_on


@bad(FeatureError, "task 'reg'", "batch is empty")
def batch_is_empty(bench):
    out = bench.net(bench.x[:0])
    losses = make_losses(out, {name: y[:0] for name, y in bench.labels.items()}, "sum")
    return bench.step(losses), bench.go_on


@bad(FeatureError, "non-finite", "check the inputs")
def features_are_not_finite(bench):
    """In a datum that no loss looks at, so that all losses are finite."""
    x = bench.x.clone()
    x[-1] = torch.inf
    out = {name: z[:-1] for name, z in bench.net(x).items()}
    losses = make_losses(out, {name: y[:-1] for name, y in bench.labels.items()})
    assert all(loss.isfinite() for loss in losses.values())
    return bench.step(losses), bench.go_on


_TRAINED: dict[Any, Any] = {}


def make_bench(phase: str, rule: str, device: torch.device, dtype: torch.dtype) -> Bench:
    """A copy of a run that was trained once, with its gradients."""
    key = (phase, rule, device, dtype)
    if key not in _TRAINED:
        net = make_net(device, dtype)
        net.trunk[2] = nn.ReLU()  # which lets infinities through
        optimizer = wrap(net, "momentum", rule, settings=QUICK)
        train(net, optimizer, PHASES[phase])
        net.trunk[1].eval()  # every datum by itself
        _TRAINED[key] = net, optimizer
    net, optimizer = copy.deepcopy(_TRAINED[key])
    for p, q in zip(net.parameters(), _TRAINED[key][0].parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    bench = Bench(net, optimizer, rule, *make_batch(device, dtype, seed=50))
    if phase == "accumulating":
        optimizer.backward(bench.losses())
    return bench


@pytest.mark.filterwarnings("ignore:task '...'. its loss is not the likelihood:UserWarning")
@pytest.mark.parametrize(("error", "says", "prepare", "phase", "rule"), CASES)
def test_bad_input(error, says, prepare, phase, rule, device, dtype):
    """Its own error, its message, no change, and training goes on as if nothing had happened."""
    results = []
    for wrong in (True, False):
        torch.manual_seed(0)
        bench = make_bench(phase, rule, device, dtype)
        call, good = prepare(bench)
        if wrong:
            before = snapshot(bench.net, bench.optimizer)
            with pytest.raises(error) as caught:
                call()
            assert type(caught.value) is error
            for pattern in says:
                assert re.search(pattern, str(caught.value)), (pattern, str(caught.value))
            assert_same(before, snapshot(bench.net, bench.optimizer))
        torch.manual_seed(0)
        good()
        results.append(snapshot(bench.net, bench.optimizer))
    if good is not nothing:
        assert difference(before["parameters"], results[0]["parameters"]) is not None
    assert_finite(results[0]["parameters"])
    assert_same(*results)

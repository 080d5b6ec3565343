"""The public API in random order, bad input included: no NaN, no foreign error, no lost state.

Once for either rule: a state machine of each.
"""

import copy
import io
import pickle
import warnings

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.nn import functional as F

from bayesagg.errors import (
    BayesAggError,
    CaptureError,
    CheckpointError,
    FeatureError,
    LossError,
    TargetError,
    UnknownTaskError,
)
from tests.conftest import DEVICE, DTYPE
from tests.helpers.data import LOSSES, losses_over, make_batch, without
from tests.helpers.nets import make_net
from tests.helpers.settings import OUTPUTS, SAMPLED
from tests.helpers.states import assert_finite, assert_same, snapshot
from tests.helpers.training import wrap

TASKS = list(OUTPUTS)
SETTINGS = {**SAMPLED, "reg": {"noise_variance": "learned"}}


# Losses and targets that are refused, made from a machine, and the error of each.
BAD = {
    "wrong_kind": (LossError, lambda m: {"reg": F.l1_loss(m.out["reg"], m.labels["reg"])}),
    "not_finite": (LossError, lambda m: {"bin": m.loss("bin") * torch.nan}),
    "detached": (LossError, lambda m: {"cls": m.loss("cls").detach()}),
    "exchanged": (LossError, lambda m: {"reg": m.loss("bin"), "bin": m.loss("reg")}),
    "of_no_head": (UnknownTaskError, lambda m: {"reg": m.loss("reg"), "age": m.loss("bin")}),
    "empty": (LossError, lambda m: {}),
    "not_a_tensor": (LossError, lambda m: {"reg": 1.0}),
    "too_few": (LossError, lambda m: [m.loss("reg")]),
}
BAD_TARGETS = {
    "without_loss": (UnknownTaskError, "reg", lambda m: {"bin": m.labels["bin"]}),
    "of_wrong_shape": (TargetError, "reg", lambda m: {"reg": m.labels["reg"][:-1]}),
    "infinite": (TargetError, "reg", lambda m: {"reg": m.labels["reg"] * torch.inf}),
    "out_of_range": (TargetError, "bin", lambda m: {"bin": m.labels["bin"] + 2}),
    "class_out_of_range": (TargetError, "cls", lambda m: {"cls": m.labels["cls"] + 3}),
    "of_another_batch": (
        TargetError,
        "reg",
        lambda m: {"reg": 2 * m.out["reg"].detach() - m.labels["reg"]},
    ),
}

BATCHES = st.fixed_dictionaries(
    {
        "names": st.sets(st.sampled_from(TASKS), min_size=1),
        "given": st.sampled_from([set(), {"reg"}, set(TASKS)]),
        "holes": st.booleans(),
        "factor": st.sampled_from([1.0, 1e-3, 1e3]),
        "reduction": st.sampled_from(["mean", "sum"]),
        "step": st.booleans(),
        "scalar": st.booleans(),
    }
)


class Loop(RuleBasedStateMachine):
    """A user who does everything, in no order."""

    rule: str

    def begin(self, **arguments):
        self.arguments = arguments
        self.net = make_net(DEVICE, DTYPE)
        self.optimizer = self.wrapped(self.net)
        self.out = self.saved = None
        self.index = 0

    def wrapped(self, net):
        return wrap(net, "adam", self.rule, settings=SETTINGS, **self.arguments)

    def loss(self, name):
        return LOSSES[name](self.out[name], self.labels[name])

    def drop_forward(self):
        """Parameters change now, so the graph of an open forward pass is of no use any more."""
        self.out = None
        self.optimizer.engine._capture.clear()

    def refuses(self, error, call):
        """The very error (or one of those), and not a bit has changed."""
        errors = error if isinstance(error, tuple) else (error,)
        before = snapshot(self.net, self.optimizer)
        try:
            call()
        except BayesAggError as caught:
            assert type(caught) in errors, (type(caught), caught)
        else:
            raise AssertionError(f"none of {errors}")
        assert_same(before, snapshot(self.net, self.optimizer))

    @rule(size=st.integers(2, 6))
    def forward_pass(self, size):
        self.forward(size)

    def forward(self, size):
        self.index += 1
        self.x, self.labels = make_batch(DEVICE, DTYPE, seed=self.index, size=size)
        self.out = self.net(self.x)

    @rule()
    def evaluate(self):
        before = snapshot(self.net, self.optimizer)
        self.net.eval()
        self.net(make_batch(DEVICE, DTYPE, seed=77)[0])
        self.net.train()
        with torch.no_grad():
            self.net.heads["reg"](torch.zeros(2, 4, device=DEVICE, dtype=DTYPE))
        assert_same(before, snapshot(self.net, self.optimizer))

    @rule(batches=st.lists(BATCHES, min_size=1, max_size=4))
    def train(self, batches):
        for batch in batches:
            self.backward(**batch)

    def backward(self, names, given, holes, factor, reduction, step, scalar):
        if self.out is None:
            self.forward(4)
        labels = {name: self.labels[name] for name in sorted(names)}
        for name in labels if holes else ():
            gaps = torch.arange(len(labels[name]), device=DEVICE) % 2 == 0
            labels = without(labels, name, gaps)
        losses = losses_over({name: self.out[name] for name in labels}, labels, reduction)
        targets = {name: y for name, y in labels.items() if name in given}
        if scalar:
            (factor * self.optimizer.loss(losses, targets)).backward()
            if step:
                self.optimizer.step()
        else:
            losses = {name: loss * factor for name, loss in losses.items()}
            (self.optimizer.step if step else self.optimizer.backward)(losses, targets=targets)
        self.out = None

    @precondition(lambda self: self.out is not None)
    @rule()
    def robust_loss(self):
        """It is not the head's likelihood: with targets its own gradient trains the head."""
        loss = F.huber_loss(self.out["reg"], self.labels["reg"], delta=0.5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "task 'reg': its loss is not the likelihood")
            self.optimizer.step({"reg": loss}, targets={"reg": self.labels["reg"]})
        self.out = None

    @precondition(lambda self: self.out is not None)
    @rule()
    def scalar_without_use(self):
        before = self.optimizer.state_dict()["bayesagg"]["memory"]
        self.optimizer.loss({name: self.loss(name) for name in TASKS})
        assert_same({"m": before}, {"m": self.optimizer.state_dict()["bayesagg"]["memory"]})
        self.out = None

    @precondition(lambda self: self.out is not None)
    @rule(bad=st.sampled_from(sorted(BAD)), step=st.booleans())
    def bad_losses(self, bad, step):
        error, losses = BAD[bad]
        call = self.optimizer.step if step else self.optimizer.backward
        self.refuses(error, lambda: call(losses(self)))

    @precondition(lambda self: self.out is not None)
    @rule(bad=st.sampled_from(sorted(BAD_TARGETS)), step=st.booleans())
    def bad_targets(self, bad, step):
        error, name, targets = BAD_TARGETS[bad]
        known = self.optimizer.state_dict()["bayesagg"]["reader"].get(name, {})
        if known.get("own") and error is TargetError:
            return  # nothing is inferred from them
        call = self.optimizer.step if step else self.optimizer.backward
        losses = {name: self.loss(name)}
        self.refuses(error, lambda: call(losses, targets=targets(self)))

    @precondition(lambda self: self.out is None)
    @rule()
    def backward_without_forward(self):
        loss = sum(p.sum() for p in self.net.heads["reg"].parameters())
        self.refuses(CaptureError, lambda: self.optimizer.backward({"reg": loss}))

    @rule(value=st.sampled_from([torch.nan, torch.inf]))
    def bad_features(self, value):
        x, _ = make_batch(DEVICE, DTYPE, seed=5)
        h = torch.full((len(x), 4), value, device=DEVICE, dtype=DTYPE)
        before = snapshot(self.net, self.optimizer)["buffers"]
        hooked = self.net.trunk.register_forward_hook(lambda m, a, out: out + h, prepend=True)
        out = self.net(x)
        hooked.remove()
        with torch.no_grad():  # batch normalisation has seen a batch more
            for name, buffer in self.net.named_buffers():
                buffer.copy_(before[name])
        losses = {"reg": out["reg"].nan_to_num(0, 0, 0).square().mean()}
        self.refuses((FeatureError, LossError), lambda: self.optimizer.backward(losses))
        self.drop_forward()

    @rule()
    def bare_step(self):
        self.drop_forward()
        self.optimizer.step()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)

    @rule()
    def end_epoch(self):
        self.drop_forward()
        self.optimizer.end_epoch()

    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save((self.net.state_dict(), self.optimizer.state_dict()), file)
        self.saved = file.getvalue()

    @precondition(lambda self: self.saved is not None)
    @rule(fresh=st.booleans())
    def load(self, fresh):
        self.drop_forward()
        model, state = torch.load(io.BytesIO(self.saved), weights_only=True)
        if fresh:
            self.net = make_net(DEVICE, DTYPE, seed=9)
            self.optimizer = self.wrapped(self.net)
        self.net.load_state_dict(model)
        self.optimizer.load_state_dict(state)
        assert_same({"s": self.optimizer.state_dict()}, {"s": state})

    @rule(pickled=st.booleans())
    def copy(self, pickled):
        pair = (self.net, self.optimizer)
        before = self.optimizer.state_dict()
        self.drop_forward()
        for p in self.net.parameters():
            p.grad = None
        self.optimizer.zero_grad()
        self.net, self.optimizer = (
            pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
        )
        assert_same({"s": before}, {"s": self.optimizer.state_dict()})

    @rule(wrong=st.sampled_from(["plain", "heads", "part"]))
    def bad_load(self, wrong):
        state = self.optimizer.state_dict()
        if wrong == "plain":
            state = self.optimizer.base_optimizer.state_dict()
        elif wrong == "heads":
            outputs = {"reg": 2, "bin": 1, "cls": 3}
            state = wrap(make_net(DEVICE, DTYPE, outputs=outputs), "adam", self.rule).state_dict()
        else:
            state["bayesagg"] = {"steps": 0}
        self.refuses(CheckpointError, lambda: self.optimizer.load_state_dict(state))

    @invariant()
    def finite(self):
        if not hasattr(self, "net"):
            return
        found = snapshot(self.net, self.optimizer)
        assert_finite(found)
        total = sum(float(weights.sum()) for weights in self.optimizer.task_weights.values())
        assert abs(total - 1) < 1e-5


class Likelihood(Loop):
    rule = "likelihood"

    @initialize(
        warmup=st.integers(0, 2), memory=st.sampled_from([None, 10]), keep_length=st.booleans()
    )
    def start(self, **arguments):
        self.begin(**arguments)


class Paper(Loop):
    rule = "paper"

    @initialize(
        kind=st.sampled_from([{}, {"covariance": "full"}, {"max_data": 3}]),
        steps_per_epoch=st.sampled_from([None, 1, 3]),
        pretrain_epochs=st.integers(0, 1),
    )
    def start(self, kind, **arguments):
        self.begin(**kind, **arguments)


class TestLikelihood(Likelihood.TestCase):
    settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)


class TestPaper(Paper.TestCase):
    settings = TestLikelihood.settings

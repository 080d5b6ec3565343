"""Bad losses and targets: each its own error, which says what to do; nothing changes.

What is bad whatever the kind of head, and features, are in ``tests/test_bad_input.py``.
"""

import json

import pytest
import torch
from torch.nn import functional as F

from bayesagg.errors import LossError, TargetError, UnknownTaskError
from tests.helpers.data import LOSSES
from tests.reading.bench import Bench, labels_by_task
from tests.reading.losses import ALL, one_hot

KINDS = {"reg": "reg", "bin": "bin", "cls": "cls"}
OUTPUTS = {"reg": 2, "bin": 2, "cls": 3}


@pytest.fixture
def bench(device, dtype):
    return Bench(KINDS, OUTPUTS, device=device, dtype=dtype)


def refused(bench, losses, error, *says, targets=None):
    """The error and its message; before and after other steps, and no trace is left."""
    before = bench.reader.state_dict()
    with pytest.raises(error) as caught:
        bench.read(losses, targets)
    assert type(caught.value) is error
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert bench.reader.state_dict() == before


def both(bench, check):
    """At first sight, and once the losses are known."""
    check()
    bench.step(seed=1)
    check()
    assert None not in labels_by_task(bench.step(seed=2)[0]).values()


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_unreduced_loss_is_not_finite(bench, value):
    def check():
        wrong = F.mse_loss(*(pair["reg"] for pair in bench.batch(6)), reduction="none")
        wrong = torch.cat([wrong[:1], wrong[1:2] + value, wrong[2:]])
        refused(bench, {"reg": wrong}, LossError, "'reg'", "not finite", "mask")

    both(bench, check)


def test_a_missing_label_is_hidden_by_where(bench):
    def check():
        out, labels = bench.batch(6)
        y = labels["reg"].clone()
        y[0] = torch.nan
        squares = (out["reg"] - y).square()
        wrong = torch.where(y.isnan(), torch.zeros_like(squares), squares).mean()
        assert wrong.isfinite()
        losses = {**bench.losses(out, labels), "reg": wrong}
        refused(bench, losses, LossError, "'reg'", "NaN", "mask")

    both(bench, check)


def test_a_loss_is_that_of_another_task(bench):
    def check():
        new = bench.losses(*bench.batch(6, seed=3))
        refused(bench, {"reg": new["reg"], "bin": new["cls"]}, LossError, "'bin'", "right head")
        swapped = {"reg": new["bin"], "bin": new["reg"]}
        refused(bench, swapped, LossError, "right head")

    both(bench, check)


def test_an_unknown_task_has_two_remedies(bench):
    losses = bench.losses(*bench.batch(6))
    says = ("'aux'", "'reg', 'bin', 'cls'", "passthrough=('aux',)", "LossTask()")
    refused(bench, {**losses, "aux": losses["reg"]}, UnknownTaskError, *says)


# Of one datum the likelihood with another factor, or without sense.
OF_MANY = {"weighted", "classes", "softmax", "broadcast", "roots"}
OF_MANY |= {name for losses in ALL.values() for name in losses if "pooled" in name}


CASES = [(kind, name) for kind, losses in ALL.items() for name in losses]


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [(*case, rows) for case in CASES for rows in (1, 6) if rows > 1 or case[1] not in OF_MANY],
)
def test_another_loss_needs_targets(bench, kind, name, rows):
    def check():
        out, labels = bench.batch(rows, seed=2)
        losses = {**bench.losses(out, labels), kind: 3 * ALL[kind][name](out[kind], labels[kind])}
        refused(bench, losses, LossError, f"task '{kind}'", "pass `targets=`", "LossTask()")

    both(bench, check)


# Weights, which targets explain; and what has no sense beside targets of another form.
WEIGHTED = {("reg", "weighted"), ("bin", "weighted"), ("bin", "classes"), ("reg", "constant")}
WEIGHTED |= {("cls", "weighted"), ("cls", "classes")}
SENSELESS = {("bin", "softmax"), ("reg", "binary"), ("cls", "raw"), ("cls", "smoothed")}


@pytest.mark.filterwarnings("ignore:task .*. its loss is not the likelihood:UserWarning")
@pytest.mark.parametrize(
    ("kind", "name"), [case for case in CASES if case not in WEIGHTED | SENSELESS]
)
def test_another_loss_goes_by_its_own_gradient(bench, kind, name):
    """With targets, now and once that is known, also from a checkpoint."""
    for seed in range(3):
        out, labels = bench.batch(10, seed)
        z, y = out[kind], labels[kind]
        if name == "pooled":
            y = y[:1].expand_as(y)  # the label of the bag
        loss = ALL[kind][name](z, y)
        (part,) = bench.read({kind: loss}, {kind: y}).parts
        assert part.labels is None
        (expected,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(part.gradient.view_as(z), expected)
        bench.reader = bench.reader.loaded(json.loads(json.dumps(bench.reader.state_dict())))


# --- targets -------------------------------------------------------------------------------------


def test_targets_do_not_belong(bench):
    out, labels = bench.batch(6)
    losses = bench.losses(out, labels)
    refused(bench, losses, UnknownTaskError, "'age'", "`targets`", targets={"age": labels["reg"]})
    one = {"reg": losses["reg"]}
    refused(bench, one, UnknownTaskError, "'bin'", "no loss", targets={"bin": labels["bin"]})
    for wrong in ([labels["reg"]], labels["reg"]):
        refused(bench, losses, TargetError, "targets", "mapping", targets=wrong)
    listed = {"reg": labels["reg"].tolist()}
    refused(bench, losses, TargetError, "'reg'", "tensors", targets=listed)


def entry(value):
    def change(y, z):
        y.view(-1)[0] = value
        return y

    return change


def probabilities(value):
    return lambda y, z: entry(value)(one_hot(y, z), z)


WRONG_TARGETS = {
    "reg": {
        "inf": (entry(torch.inf), "NaN for a missing label"),
        "fewer outputs": (lambda y, z: y[:, :1], "one target per output"),
        "fewer data": (lambda y, z: y[:-1], "one target per output"),
        "more data": (lambda y, z: torch.cat([y, y]), "one target per output"),
        "transposed": (lambda y, z: y.mT, "one target per output"),
        "flat": (lambda y, z: y[:, 0], "one target per output"),
        "mirrored": (lambda y, z: 2 * z - y, "points away"),
        "others": (lambda y, z: y.flip(0) + 0.1, "points away"),
    },
    "bin": {
        "inf": (entry(torch.inf), "NaN for a missing label"),
        "two": (entry(2.0), "[0, 1]"),
        "negative": (entry(-1.0), "[0, 1]"),
        "inverted": (lambda y, z: 1 - y, "points away"),
        "soft": (lambda y, z: 0.8 * y + 0.1, "points away"),
    },
    "cls": {
        "three": (entry(3), "outside 0 to 2"),
        "negative": (entry(-1), "outside 0 to 2"),
        "fewer data": (lambda y, z: y[:-1], "class index per datum"),
        "one-hot integers": (lambda y, z: F.one_hot(y, 3), "class index per datum"),
        "floating": (lambda y, z: y.to(z.dtype), "integer dtype"),
        "fewer classes": (lambda y, z: one_hot(y, z)[:, :2], "integer dtype"),
        "too large": (probabilities(2.0), "sum to one"),
        "below zero": (probabilities(-0.5), "sum to one"),
        "inf": (probabilities(torch.inf), "sum to one"),
        "rotated": (lambda y, z: (y + 1) % 3, "points away"),
        "soft": (lambda y, z: 0.9 * one_hot(y, z) + 0.1 / 3, "points away"),
    },
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, some in WRONG_TARGETS.items() for name in some]
)
def test_targets_are_not_the_labels_of_the_loss(bench, kind, name):
    change, says = WRONG_TARGETS[kind][name]

    def check():
        out, labels = bench.batch(6)
        targets = {**labels, kind: change(labels[kind].clone(), out[kind].detach())}
        refused(bench, bench.losses(out, labels), TargetError, f"'{kind}'", says, targets=targets)

    both(bench, check)


@pytest.mark.parametrize("kind", ["bin", "cls"])
def test_label_smoothing_has_smoothed_targets(bench, kind):
    def losses(out, labels):
        if kind == "cls":
            return F.cross_entropy(out["cls"], labels["cls"], label_smoothing=0.2)
        return LOSSES["bin"](out["bin"], 0.8 * labels["bin"] + 0.1)

    out, labels = bench.batch(6)
    refused(
        bench, {kind: losses(out, labels)}, TargetError, "smoothed", targets={kind: labels[kind]}
    )
    out, labels = bench.batch(6)
    y = one_hot(labels["cls"], out["cls"]) if kind == "cls" else labels["bin"]
    targets = {kind: 0.8 * y + 0.2 / (3 if kind == "cls" else 2)}
    assert labels_by_task(bench.read({kind: losses(out, labels)}, targets))[kind] is not None

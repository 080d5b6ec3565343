"""Bad losses, targets and features: each its own error, which says what to do; nothing changes.

What is bad whatever the kind of head is in ``tests/test_bad_input.py``.
"""

import pytest
import torch
from torch.nn import functional as F

from bayesagg.errors import FeatureError, LossError, TargetError, UnknownTaskError
from tests.helpers.data import LOSSES, make_losses
from tests.reading.bench import Bench, labels_by_task
from tests.reading.losses import ALL, one_hot

KINDS = {"reg": "reg", "bin": "bin", "cls": "cls"}
OUTPUTS = {"reg": 2, "bin": 2, "cls": 3}


@pytest.fixture
def bench(device, dtype):
    return Bench(KINDS, OUTPUTS, device=device, dtype=dtype)


def make(bench, rows=6, seed=0):
    """Outputs of a new forward pass, and labels."""
    generator = torch.Generator().manual_seed(seed)
    out = bench.outputs(bench.features(rows, seed))
    labels = {
        "reg": torch.randn(rows, 2, generator=generator).to(out["reg"]),
        "bin": torch.randint(2, (rows, 2), generator=generator).to(out["bin"]),
        "cls": torch.randint(3, (rows,), generator=generator).to(out["cls"].device),
    }
    return out, labels


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
    out, labels = make(bench, seed=1)
    bench.read(make_losses(out, labels))
    check()
    out, labels = make(bench, seed=2)
    assert None not in labels_by_task(bench.read(make_losses(out, labels))).values()


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_unreduced_loss_is_not_finite(bench, value):
    def check():
        wrong = F.mse_loss(*(pair["reg"] for pair in make(bench)), reduction="none")
        wrong = torch.cat([wrong[:1], wrong[1:2] + value, wrong[2:]])
        refused(bench, {"reg": wrong}, LossError, "'reg'", "not finite", "mask")

    both(bench, check)


def test_a_missing_label_is_hidden_by_where(bench):
    def check():
        out, labels = make(bench)
        y = labels["reg"].clone()
        y[0] = torch.nan
        squares = (out["reg"] - y).square()
        wrong = torch.where(y.isnan(), torch.zeros_like(squares), squares).mean()
        assert wrong.isfinite()
        losses = {**make_losses(out, labels), "reg": wrong}
        refused(bench, losses, LossError, "'reg'", "NaN", "mask")

    both(bench, check)


def test_a_loss_is_that_of_another_task(bench):
    def check():
        new = make_losses(*make(bench, seed=3))
        refused(bench, {"reg": new["reg"], "bin": new["cls"]}, LossError, "'bin'", "right head")
        swapped = {"reg": new["bin"], "bin": new["reg"]}
        refused(bench, swapped, LossError, "right head")

    both(bench, check)


def test_an_unknown_task_has_two_remedies(bench):
    losses = make_losses(*make(bench))
    says = ("'aux'", "'reg', 'bin', 'cls'", "passthrough=('aux',)", "LossTask()")
    refused(bench, {**losses, "aux": losses["reg"]}, UnknownTaskError, *says)


CASES = [(kind, name) for kind, losses in ALL.items() for name in losses]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_another_loss_needs_targets(bench, kind, name):
    def check():
        out, labels = make(bench)
        losses = {**make_losses(out, labels), kind: ALL[kind][name](out[kind], labels[kind])}
        refused(bench, losses, LossError, f"task '{kind}'", "pass `targets=`", "LossTask()")

    both(bench, check)


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if "pooled" not in case[1]])
def test_another_loss_of_one_datum_needs_targets(bench, kind, name):
    if name in ("weighted", "classes", "softmax", "broadcast", "roots"):
        pytest.skip("of one datum it is the likelihood with another factor, or has no sense")
    out, labels = make(bench, rows=1, seed=2)
    losses = {kind: 3 * ALL[kind][name](out[kind], labels[kind])}
    refused(bench, losses, LossError, f"task '{kind}'", "pass `targets=`")


# --- targets -------------------------------------------------------------------------------------


def test_targets_do_not_belong(bench):
    out, labels = make(bench)
    losses = make_losses(out, labels)
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
        out, labels = make(bench)
        targets = {**labels, kind: change(labels[kind].clone(), out[kind].detach())}
        refused(bench, make_losses(out, labels), TargetError, f"'{kind}'", says, targets=targets)

    both(bench, check)


@pytest.mark.parametrize("kind", ["bin", "cls"])
def test_label_smoothing_has_smoothed_targets(bench, kind):
    def losses(out, labels):
        if kind == "cls":
            return F.cross_entropy(out["cls"], labels["cls"], label_smoothing=0.2)
        return LOSSES["bin"](out["bin"], 0.8 * labels["bin"] + 0.1)

    out, labels = make(bench)
    refused(
        bench, {kind: losses(out, labels)}, TargetError, "smoothed", targets={kind: labels[kind]}
    )
    out, labels = make(bench)
    y = one_hot(labels["cls"], out["cls"]) if kind == "cls" else labels["bin"]
    targets = {kind: 0.8 * y + 0.2 / (3 if kind == "cls" else 2)}
    assert labels_by_task(bench.read({kind: losses(out, labels)}, targets))[kind] is not None


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_are_not_finite(bench, value):
    """In a datum that no loss looks at, so that all losses are finite."""

    def check():
        h = bench.features(6).detach()
        h[-1] = value
        out = {name: z[:-1] for name, z in bench.outputs(h.requires_grad_()).items()}
        labels = {name: y[:-1] for name, y in make(Bench(KINDS, OUTPUTS))[1].items()}
        labels = {n: y.to(out[n] if n != "cls" else out[n].device) for n, y in labels.items()}
        refused(bench, make_losses(out, labels), FeatureError, "non-finite", "check the inputs")

    both(bench, check)


def test_an_empty_batch(bench):
    out, labels = make(bench, rows=0)
    losses = {
        name: LOSSES[name](out[name], labels[name], reduction="sum") for name in ("reg", "bin")
    }
    refused(bench, losses, FeatureError, "empty")

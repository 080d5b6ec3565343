"""With ``targets=``: weights, losses of other kinds, terms by other paths, coupled heads."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from bayesagg.errors import LossError, TargetError
from tests.helpers.data import LOSSES
from tests.reading.bench import Bench, labels_by_task
from tests.reading.losses import ALL

OUTPUTS = {"reg": 2, "bin": 2, "cls": 3}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="task .*: its loss is not the likelihood")
        yield


def data(bench, rows=10, seed=0):
    """Features, outputs of the head "a" and its labels."""
    h = bench.features(rows, seed)
    z = bench.outputs(h)["a"]
    return h, z, bench.labels({"a": z}, seed)["a"]


def single(kind, device, dtype):
    return Bench({"a": kind}, OUTPUTS[kind], device=device, dtype=dtype)


# --- weights -------------------------------------------------------------------------------------


def some_of_zero(y, w):
    return torch.where(torch.arange(len(w), device=w.device) % 3 > 0, w, 0)


def of_classes(y, w):
    """One for every class, or of each entry; of few data not all need be there."""
    if y.is_floating_point():
        return torch.where(y > 0, 3.0, 1.0).to(w)
    return torch.tensor([1.0, 3.0, 7.0]).to(w)[y]


# By name: weights of a datum or an entry, from its labels and numbers that rise; and a penalty, of
# which neither the value nor the first derivatives tell it apart.
WEIGHTS = {
    "of examples": (lambda y, w: w, 0),
    "some of zero": (some_of_zero, 0),
    "of classes": (of_classes, 0),
    "beside a penalty": (lambda y, w: w, 1),
    "alike beside a penalty": (lambda y, w: torch.ones_like(w), 3),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kind", OUTPUTS)
def test_weights_of_examples_are_factors(device, dtype, kind, name):
    """With targets, in every step; a weight of zero is a missing label."""
    weights, penalty = WEIGHTS[name]
    bench = single(kind, device, dtype)
    for seed in range(3):
        h, z, y = data(bench, seed=seed)
        each = LOSSES[kind](z, y, reduction="none")
        w = weights(y, torch.logspace(-3, 1, len(z)).to(z))
        w = w[:, None] if w.dim() < each.dim() else w
        loss = (w * each).mean() + penalty * h.square().mean()
        with pytest.raises(LossError, match=r"'a'.*targets="):
            bench.read({"a": loss})
        batch = bench.read({"a": loss}, {"a": y})
        labels = labels_by_task(batch)["a"]
        known = (w > 0).expand_as(each).view(len(z), -1)
        present = torch.ones_like(known) if labels.present is None else labels.present
        assert torch.equal(present, known) and (labels.factor > 0).all()
        expected = (w / each.numel()).expand_as(each).view(len(z), -1)
        found = labels.factor.expand_as(expected)
        torch.testing.assert_close(found[known], expected[known], rtol=1e-4, atol=0)
        assert batch.total is batch.losses["a"]


def test_small_targets(device, dtype):
    """Of no size beside one; the scale of the labels means nothing."""
    bench = single("reg", device, dtype)
    with torch.no_grad():
        for parameter in bench.modules["a"].parameters():
            parameter.mul_(1e-12)
    for seed in range(3):
        _, z, y = data(bench, seed=seed)
        y = 1e-12 * y
        labels = labels_by_task(bench.read({"a": F.mse_loss(z, y)}, {"a": y}))["a"]
        assert torch.equal(labels.targets, y) and labels.present is None
        torch.testing.assert_close(labels.factor, torch.full_like(labels.factor, 1 / z.numel()))


# --- other losses; more of them are in ``test_bad_losses.py`` ------------------------------------


def test_own_gradients_are_announced_once_and_need_targets_in_every_step(device, dtype):
    bench = single("reg", device, dtype)
    batches = [data(bench, seed=seed)[2] for seed in range(4)]
    losses = [F.l1_loss] * 3 + [F.mse_loss]

    def read(seed, given):
        z = data(bench, seed=seed)[1]
        loss = losses[seed](z, batches[seed])
        return bench.read({"a": loss}, {"a": batches[seed]} if given else None)

    with pytest.warns(UserWarning, match=r"'a'.*own gradient"):
        read(0, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(1, True)
    with pytest.raises(LossError, match=r"'a'.*targets="):
        read(2, False)
    assert read(3, False).parts[0].labels is None


@pytest.mark.parametrize("given", [False, True])
def test_a_loss_that_is_the_likelihood_at_first(device, dtype, given):
    """Huber without outliers is a squared error, until there is one."""
    bench = single("reg", device, dtype)
    for seed in range(4):
        _, z, y = data(bench, seed=seed)
        if seed == 2:
            y[3, 0] += 100
        loss = F.huber_loss(z, y, delta=20.0)
        targets = {"a": y} if given else None
        if seed == 2 and not given:
            with pytest.raises(LossError, match=r"'a'.*targets="):
                bench.read({"a": loss}, targets)
            continue
        labels = labels_by_task(bench.read({"a": loss}, targets))["a"]
        assert (labels is None) == (given and seed >= 2)  # it stays so
        if labels is not None:
            torch.testing.assert_close(labels.targets, y)


# --- other paths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_an_offset_model(device, dtype, given):
    """The head explains what another part of the network leaves."""
    bench = single("reg", device, dtype)
    for seed in range(3):
        h, z, y = data(bench, seed=seed)
        other = torch.sin(h[:, :2])
        loss = F.mse_loss(z + other, y)
        left = y - other.detach()
        labels = labels_by_task(bench.read({"a": loss}, {"a": left} if given else None))["a"]
        torch.testing.assert_close(labels.targets, left)
    _, z, y = data(bench)
    with pytest.raises(TargetError, match=r"other labels.*leave `targets=` out"):
        bench.read({"a": F.mse_loss(z + 1, y)}, {"a": y})


def test_the_pool_that_comes_later(device, dtype):
    """Its value is the one that its labels seem to give, so that only its form shows it."""
    bench = single("reg", device, dtype)
    for seed in range(2):
        _, z, y = data(bench, seed=seed)
        bench.read({"a": F.mse_loss(z, y)})
    _, z, y = data(bench, seed=2)
    with pytest.raises(LossError, match="pooled"):
        bench.read({"a": F.mse_loss(z.mean(0), y[0])})


# --- coupled heads -------------------------------------------------------------------------------


def product(z, y):
    """Of conversion given click and of click, as in ESMM."""
    p = z["a"].sigmoid() * z["b"].sigmoid()
    return {"a": LOSSES["bin"](z["a"], y["a"]), "b": F.binary_cross_entropy(p, y["a"] * y["b"])}


def distance(z, y):
    losses = {name: LOSSES["bin"](z[name], y[name]) for name in y}
    return {**losses, "a": losses["a"] + (z["a"] - z["b"]).square().mean()}


def attached_weights(z, y):
    each = LOSSES["bin"](z["a"], y["a"], reduction="none")
    return {"a": (each * z["b"].sigmoid()).mean(), "b": LOSSES["bin"](z["b"], y["b"])}


COUPLED = {"product": product, "distance": distance, "attached weights": attached_weights}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_heads(device, dtype, name, known):
    """Without the targets of both the error names both; with them both go by their gradients."""
    bench = Bench({"a": "bin", "b": "bin", "c": "reg"}, 1, device=device, dtype=dtype)

    def make(seed):
        z, labels = bench.batch(10, seed)
        return z, {n: labels[n] for n in "ab"}, {"c": z["c"].square().mean()}

    if known:
        for seed in range(2):
            z, y, other = make(seed)
            bench.read({**{n: LOSSES["bin"](z[n], y[n]) for n in "ab"}, **other})
    for targets in (None, "a", "b"):
        z, y, other = make(3)
        given = None if targets is None else {targets: y[targets]}
        with pytest.raises(LossError) as caught:
            bench.read({**COUPLED[name](z, y), **other}, given)
        says = str(caught.value)
        assert "'a'" in says and "'b'" in says and "'c'" not in says and "targets=" in says
        culprit = "b" if name == "product" else "a"
        assert says.startswith(f"task '{culprit}'")
    for seed in (4, 5):
        z, y, other = make(seed)
        losses = {**COUPLED[name](z, y), **other}
        batch = bench.read(losses, y)
        found = labels_by_task(batch)
        assert found["a"] is None and found["b"] is None and found["c"] is not None
        expected = torch.autograd.grad(sum(losses.values()), [z["a"], z["b"]])
        for part in batch.parts:
            if part.labels is None:
                torch.testing.assert_close(part.gradient, torch.cat(expected, 1))


def test_weights_of_another_head_may_be_detached(device, dtype):
    bench = Bench({"a": "bin", "b": "bin"}, 1, device=device, dtype=dtype)
    for seed in range(3):
        z, y = bench.batch(10, seed)
        each = LOSSES["bin"](z["a"], y["a"], reduction="none")
        w = z["b"].detach().sigmoid()
        losses = {"a": (each * w).mean(), "b": LOSSES["bin"](z["b"], y["b"])}
        found = labels_by_task(bench.read(losses, y))
        torch.testing.assert_close(found["a"].factor, w / 10)
        assert len(found["b"].factor) == 1


# --- without second derivatives ------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """A loss that can be differentiated once, as a compiled one."""

    @staticmethod
    def forward(ctx, z, loss):
        with torch.enable_grad():
            inner = z.detach().requires_grad_()
            value = loss(inner)
        (ctx.gradient,) = torch.autograd.grad(value, inner)
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.gradient, None


ONCE = {
    ("reg", "plain"): (F.mse_loss, True),
    ("reg", "huber"): (lambda z, y: F.huber_loss(z, y, delta=0.5), False),
    ("reg", "pooled"): (lambda z, y: F.mse_loss(z.mean(0), y.mean(0)), False),
    ("reg", "l1"): (F.l1_loss, False),
    ("bin", "plain"): (LOSSES["bin"], True),
    ("bin", "focal"): (ALL["bin"]["focal"], False),
    ("cls", "plain"): (LOSSES["cls"], True),
    ("cls", "one-vs-rest"): (ALL["cls"]["one-vs-rest"], False),
}


@pytest.mark.parametrize(("kind", "name"), ONCE)
def test_a_loss_without_second_derivatives(device, dtype, kind, name):
    loss, fits = ONCE[kind, name]
    bench = Bench({"a": kind, "b": "reg"}, {"a": OUTPUTS[kind], "b": 1}, device=device, dtype=dtype)
    for seed in range(3):
        _, z, y = data(bench, seed=seed)
        (call,) = bench.capture.calls["b"]
        other = call.output.square().mean()
        losses = {"a": _Once.apply(z, lambda z, y=y: loss(z, y)), "b": other}
        if seed == 0:
            with pytest.raises(LossError, match=r"'a'.*twice.*compile.*targets="):
                bench.read(losses)
        found = labels_by_task(bench.read(losses, {"a": y}))
        assert (found["a"] is not None) == fits and found["b"] is not None
        if fits and kind != "cls":
            torch.testing.assert_close(found["a"].targets, y)

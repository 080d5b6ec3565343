"""With ``targets=``: weights, losses of other kinds, terms by other paths, coupled heads."""

import json
import warnings

import pytest
import torch
from torch.nn import functional as F

from bayesagg.errors import LossError, TargetError
from tests.helpers.data import LOSSES
from tests.reading.bench import Bench, Free, labels_by_task
from tests.reading.losses import ALL

OUTPUTS = {"reg": 2, "bin": 2, "cls": 3}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="task .*: its loss is not the likelihood")
        yield


def data(kind, bench, rows=10, seed=0):
    """Features, outputs of the head "a" and labels."""
    generator = torch.Generator().manual_seed(seed)
    h = bench.features(rows, seed)
    z = bench.outputs(h)["a"]
    if kind == "cls":
        return h, z, torch.randint(z.shape[1], (rows,), generator=generator).to(z.device)
    y = torch.randn(z.shape, generator=generator)
    return h, z, (y if kind == "reg" else (y > 0)).to(z)


def single(kind, device, dtype):
    return Bench({"a": kind}, OUTPUTS[kind], device=device, dtype=dtype)


def expand(w, kind):
    return w if kind == "cls" else w[:, None]


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OUTPUTS)
def test_weights_of_examples_are_factors(device, dtype, kind):
    bench = single(kind, device, dtype)
    for seed in range(3):
        _, z, y = data(kind, bench, seed=seed)
        w = torch.logspace(-3, 1, len(z)).to(z)
        loss = (expand(w, kind) * LOSSES[kind](z, y, reduction="none")).mean()
        labels = labels_by_task(bench.read({"a": loss}, {"a": y}))["a"]
        terms = len(z) if kind == "cls" else z.numel()
        expected = (w / terms)[:, None].expand_as(labels.factor)
        torch.testing.assert_close(labels.factor, expected, rtol=1e-4, atol=0)
        assert labels.present is None
    _, z, y = data(kind, bench)
    loss = (expand(w, kind) * LOSSES[kind](z, y, reduction="none")).mean()
    with pytest.raises(LossError, match=r"'a'.*targets="):
        bench.read({"a": loss})


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_weight_of_zero_is_a_missing_label(device, dtype, kind):
    bench = single(kind, device, dtype)
    for seed in range(3):
        _, z, y = data(kind, bench, seed=seed)
        w = torch.linspace(1, 2, len(z)).to(z)
        w[::3] = 0
        loss = (expand(w, kind) * LOSSES[kind](z, y, reduction="none")).mean()
        labels = labels_by_task(bench.read({"a": loss}, {"a": y}))["a"]
        assert torch.equal(labels.present, (w > 0)[:, None].expand_as(labels.present))
        assert (labels.factor > 0).all() and labels.factor.isfinite().all()


@pytest.mark.parametrize("kind", ["bin", "cls"])
def test_weights_of_classes_are_factors(device, dtype, kind):
    bench = single(kind, device, dtype)
    for seed in range(3):
        _, z, y = data(kind, bench, seed=seed)
        w = torch.tensor([1.0, 3.0, 7.0]).to(z)
        if kind == "cls":
            loss, of = F.cross_entropy(z, y, weight=w), w[y] / w[y].sum()
        else:
            loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=w[1])
            of = torch.where(y > 0, 3.0, 1.0) / z.numel()
        labels = labels_by_task(bench.read({"a": loss}, {"a": y}))["a"]
        torch.testing.assert_close(labels.factor, of.view_as(labels.factor).to(z))


def test_small_targets(device, dtype):
    """Of no size beside one; the scale of the labels means nothing."""
    bench = single("reg", device, dtype)
    with torch.no_grad():
        for parameter in bench.modules["a"].parameters():
            parameter.mul_(1e-12)
    for seed in range(3):
        _, z, y = data("reg", bench, seed=seed)
        y = 1e-12 * y
        labels = labels_by_task(bench.read({"a": F.mse_loss(z, y)}, {"a": y}))["a"]
        assert torch.equal(labels.targets, y) and labels.present is None
        torch.testing.assert_close(labels.factor, torch.full_like(labels.factor, 1 / z.numel()))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_weights_beside_a_penalty(device, dtype, kind):
    """The value tells nothing, the first derivatives little: all is verified in every step."""
    bench = single(kind, device, dtype)
    for seed in range(3):
        h, z, y = data(kind, bench, seed=seed)
        w = torch.linspace(1, 2, len(z)).to(z)
        loss = (expand(w, kind) * LOSSES[kind](z, y, reduction="none")).mean() + h.square().mean()
        labels = labels_by_task(bench.read({"a": loss}, {"a": y}))["a"]
        ratio = labels.factor / labels.factor[:1]
        torch.testing.assert_close(ratio, w[:, None].expand_as(ratio), rtol=1e-4, atol=0)


# --- other losses --------------------------------------------------------------------------------

WEIGHTED = {("reg", "weighted"), ("bin", "weighted"), ("bin", "classes")}
WEIGHTED |= {("cls", "weighted"), ("cls", "classes"), ("reg", "constant")}
SENSELESS = {("bin", "softmax"), ("reg", "binary"), ("cls", "raw"), ("cls", "smoothed")}
OWN_GRADIENT = [
    (kind, name)
    for kind, losses in ALL.items()
    for name in losses
    if (kind, name) not in WEIGHTED | SENSELESS
]


@pytest.mark.parametrize(("kind", "name"), OWN_GRADIENT)
def test_another_loss_goes_by_its_own_gradient(device, dtype, kind, name):
    bench = single(kind, device, dtype)
    for seed in range(3):
        _, z, y = data(kind, bench, seed=seed)
        if name == "pooled":
            y = y[:1].expand_as(y)  # the label of the bag
        loss = ALL[kind][name](z, y)
        (part,) = bench.read({"a": loss}, {"a": y}).parts
        assert part.labels is None
        (expected,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(part.gradient.view_as(z), expected)
        bench.reader = bench.reader.loaded(json.loads(json.dumps(bench.reader.state_dict())))


def test_own_gradients_are_announced_once_and_need_targets_in_every_step(device, dtype):
    bench = single("reg", device, dtype)
    batches = [data("reg", bench, seed=seed)[2] for seed in range(4)]
    losses = [F.l1_loss] * 3 + [F.mse_loss]

    def read(seed, given):
        z = data("reg", bench, seed=seed)[1]
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
        _, z, y = data("reg", bench, seed=seed)
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


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_penalty_on_the_features(device, dtype, kind):
    """It needs targets; then the labels are right, and its gradient reaches h past the head."""
    bench = single(kind, device, dtype)
    for seed in range(4):
        h, z, y = data(kind, bench, seed=seed)
        loss = LOSSES[kind](z, y) + 3 * h.square().mean()
        with pytest.raises(LossError, match=r"'a'.*targets="):
            bench.read({"a": loss})
        batch = bench.read({"a": loss}, {"a": y})
        labels = labels_by_task(batch)["a"]
        assert labels.present is None and len(labels.factor) == 1
        terms = len(z) if kind == "cls" else z.numel()
        torch.testing.assert_close(labels.factor, torch.full_like(labels.factor, 1 / terms))
        assert batch.total is batch.losses["a"]


@pytest.mark.parametrize("given", [False, True])
def test_an_offset_model(device, dtype, given):
    """The head explains what another part of the network leaves."""
    bench = single("reg", device, dtype)
    for seed in range(3):
        h, z, y = data("reg", bench, seed=seed)
        other = torch.sin(h[:, :2])
        loss = F.mse_loss(z + other, y)
        left = y - other.detach()
        labels = labels_by_task(bench.read({"a": loss}, {"a": left} if given else None))["a"]
        torch.testing.assert_close(labels.targets, left)
    _, z, y = data("reg", bench)
    with pytest.raises(TargetError, match=r"other labels.*leave `targets=` out"):
        bench.read({"a": F.mse_loss(z + 1, y)}, {"a": y})


def test_the_pool_that_comes_later(device, dtype):
    """Its value is the one that its labels seem to give, so that only its form shows it."""
    bench = single("reg", device, dtype)
    for seed in range(2):
        _, z, y = data("reg", bench, seed=seed)
        bench.read({"a": F.mse_loss(z, y)})
    _, z, y = data("reg", bench, seed=2)
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
        generator = torch.Generator().manual_seed(seed)
        z = bench.outputs(bench.features(10, seed))
        y = {n: (torch.randn(10, 1, generator=generator) > 0).to(z["a"]) for n in "ab"}
        return z, y, {"c": z["c"].square().mean()}

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
        z = bench.outputs(bench.features(10, seed))
        y = {n: (torch.randn(10, 1) > 0).to(z["a"]) for n in "ab"}
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
        _, z, y = data(kind, bench, seed=seed)
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


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("classes", [3, 1000])
def test_rounding_of_sums_over_many_classes(classes, given):
    """Single precision, saturated data, large logits: the loss is the likelihood all the same."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(32, classes, generator=generator) * (1 + seed % 5)
        y = torch.randint(classes, (32,), generator=generator)
        margin = torch.rand(32, generator=generator) * (4 + seed % 4 * 6)
        z[torch.arange(32), y] = z.logsumexp(1) + margin - 3 * (seed % 3 == 0)
        z = (z + torch.randn(1, generator=generator) * (0, 10, 50)[seed % 3]).requires_grad_()
        free = Free("cls", z)
        for _ in range(2):  # verified, then known
            labels = labels_by_task(free.read(F.cross_entropy(z, y), y if given else None))["age"]
            assert labels is not None
            assert (labels.targets.argmax(2)[:, 0] == y).all()
            free.reader.known.update(free.reader.take())

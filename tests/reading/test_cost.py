"""What a step in which nothing is new costs: one look at the device, one pass of autograd."""

import pytest
import torch
from torch.nn import functional as F

from examples.benchmark.measuring import counts
from tests.helpers.data import LOSSES
from tests.reading.bench import Bench

KINDS = {"a": "reg", "b": "bin", "c": "cls", "d": "reg", "aux": "loss"}
OUTPUTS = {"a": 2, "b": 1, "c": 4, "d": 1}
LOOKS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu")


@pytest.fixture
def looks(monkeypatch):
    """Names of the calls by which Python looks into a tensor."""
    seen = []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, **kwargs):
            seen.append(name)
            return original(self, *args, **kwargs)

        return counted

    for name in LOOKS:
        monkeypatch.setattr(torch.Tensor, name, count(name))
    return seen


def steps(bench, given, change=None):
    """Three steps that verify, and what the fourth is given."""
    for seed in range(4):
        h = bench.features(8, seed)
        out = bench.outputs(h)
        labels = bench.labels(out, seed)
        losses = bench.losses(out, labels)
        if "aux" in bench.kinds:
            losses["aux"] = h.square().mean()
        if change is not None:
            losses, labels = change(losses, out, labels)
        targets = labels if given else None
        if seed < 3:
            bench.read(losses, targets)
    return losses, targets


def weighted(losses, out, labels):
    w = torch.linspace(1, 2, 8).to(out["a"])[:, None]
    return {**losses, "a": (w * (out["a"] - labels["a"]).square()).mean()}, labels


def missing(losses, out, labels):
    labels = dict(labels)
    for name in ("b", "c", "d"):
        labels[name] = labels[name].clone()
        labels[name][::2] = -100 if name == "c" else torch.nan
    return {
        **losses,
        "b": LOSSES["bin"](out["b"][1::2], labels["b"][1::2]),
        "c": F.cross_entropy(out["c"], labels["c"]),
        "d": F.mse_loss(out["d"][1::2], labels["d"][1::2]),
    }, labels


def varying(losses, out, labels):
    """Other labels are missing in every step, and of another number."""
    some = torch.arange(8) % (2 + int(1000 * losses["a"]) % 3) > 0
    return {
        **losses,
        "b": LOSSES["bin"](out["b"][some], labels["b"][some]),
        "d": F.mse_loss(out["d"][some], labels["d"][some]),
    }, labels


def other(losses, out, labels):
    return {**losses, "a": F.l1_loss(out["a"], labels["a"])}, labels


@pytest.mark.filterwarnings("ignore:task")
@pytest.mark.parametrize(
    ("given", "change"),
    [
        *[(False, None), (True, None), (True, weighted), (True, missing), (True, other)],
        *[(False, missing), (False, varying)],
    ],
)
def test_a_known_step_looks_once(device, dtype, given, change, looks, monkeypatch):
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=dtype)
    losses, targets = steps(bench, given, change)
    passes = []
    original = torch.autograd.grad

    def grad(*args, **kwargs):
        passes.append(kwargs.get("create_graph", False))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    looks.clear()
    _, inside = counts(lambda: bench.read(losses, targets))
    assert looks == ["tolist"] and inside == 0
    assert passes == [False]


def operations(kinds, outputs, given, dtype):
    bench = Bench(kinds, outputs, dtype=dtype)
    losses, targets = steps(bench, given)
    outputs = [call.output for calls in bench.capture.calls.values() for call in calls]

    total = sum(losses.values())
    differentiating, _ = counts(lambda: torch.autograd.grad(total, outputs, retain_graph=True))
    return counts(lambda: bench.read(losses, targets))[0], differentiating


@pytest.mark.parametrize("given", [False, True])
def test_operations_of_a_step(given):
    """All of reading, and beside it what autograd needs to differentiate the losses."""
    tasks = {f"task{i}": "bin" for i in range(20)}
    every, autograd = operations(tasks, 1, given, torch.float32)
    assert every - autograd <= 160, (every, autograd)
    tasks = {f"task{i}": "reg" for i in range(4)}
    every, autograd = operations(tasks, 1, given, torch.float32)
    assert every <= 110, (every, autograd)
    mixed, autograd = operations({n: KINDS[n] for n in OUTPUTS}, OUTPUTS, given, torch.float32)
    assert mixed - autograd <= 280, (mixed, autograd)

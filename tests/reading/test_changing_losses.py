"""Losses that change between steps: what is remembered of one makes nothing false of the next."""

import pytest
import torch
from torch.nn import functional as F

from bayesagg.errors import LossError
from bayesagg.reading import reader
from tests.helpers.data import LOSSES
from tests.reading.bench import Bench, Free, labels_by_task, read
from tests.reading.losses import ALL

HALF = pytest.mark.parametrize("half", [False, True], ids=["full", "autocast"])


def outputs_of(bench, seed, *, rows=64, scale=1.0, half=False):
    """Of the head called "a"; under autocast they are rounded, and losses are not."""
    h = (bench.features(rows, seed).detach() * scale).requires_grad_()
    with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=half):
        return bench.outputs(h)["a"]


def bench_of(device, kind, outputs=1):
    return Bench({"a": kind}, outputs, dtype=torch.float32, device=device)


def check(found, out, y, known=None, factor=None, half=False):
    known = torch.ones_like(y, dtype=torch.bool) if known is None else known
    present = torch.ones_like(known) if found.present is None else found.present
    assert torch.equal(present, known)
    off = (found.targets - y).abs()[known] / (out.float() - y).abs().clamp(min=1e-3)[known]
    assert off.max() < (0.05 if half else 1e-3)
    if factor is not None:
        expected = factor.expand_as(found.factor)
        torch.testing.assert_close(found.factor, expected, rtol=0.05 if half else 1e-3, atol=0)


@HALF
@pytest.mark.parametrize("kind", ["reg", "bin"])
@pytest.mark.parametrize("change", [0.5, 0.9, 1.2, 2.0])
@pytest.mark.parametrize(("rows", "scale"), [(64, 1.0), (1, 20.0), (8, 30.0)])
def test_another_task_weight_is_not_taken_for_soft_labels(device, kind, half, change, rows, scale):
    bench = bench_of(device, kind)
    for seed in range(6):
        weight = 1.0 if seed < 2 else change
        out = outputs_of(bench, seed, rows=rows, scale=scale, half=half)
        y = bench.labels({"a": out.float()}, seed)["a"]
        loss = weight * LOSSES[kind](out.float(), y)
        found = labels_by_task(bench.read({"a": loss}))["a"]
        check(found, out, y, half=half)


@HALF
@pytest.mark.parametrize("kind", ["reg", "bin"])
@pytest.mark.parametrize("reduction", ["columns", "labels"])
@pytest.mark.parametrize("alike", [False, True], ids=["uneven", "first alike"])
def test_means_over_the_labels_of_a_column_or_of_a_head(
    device, kind, reduction, alike, half, monkeypatch
):
    """Which of both it is shows once columns have labels in another proportion."""
    verified = []
    verify = reader.verify

    def counted(*args):
        verified.append(seed)
        return verify(*args)

    monkeypatch.setattr(reader, "verify", counted)
    bench = bench_of(device, kind, 3)
    for seed in range(9):
        rates = torch.tensor([0.3, 0.6, 0.9]).roll(seed)
        chance = torch.rand(64, 3, generator=torch.Generator().manual_seed(seed))
        chance = chance[:, :1] if alike and seed < 3 else chance
        known = (chance < (0.5 if alike and seed < 3 else rates)).expand(64, 3).to(device)
        out = outputs_of(bench, seed, half=half)
        y = bench.labels({"a": out.float()}, seed)["a"]
        each = LOSSES[kind](out.float(), y, reduction="none") * known
        labels = known.sum(0)
        loss = (each.sum(0) / labels).sum() if reduction == "columns" else each.sum() / labels.sum()
        found = labels_by_task(bench.read({"a": loss}))["a"]
        number = labels if reduction == "columns" else labels.sum()
        check(found, out, y, known, 1 / number, half)
    assert max(verified) <= (4 if alike else 2)


@pytest.mark.parametrize("kind", ["reg", "bin"])
def test_labels_that_are_all_the_outputs_are_not_missing(device, dtype, kind):
    """In a head whose labels may be missing: there is no derivative, but a second one."""
    bench = Bench({"a": kind}, 1, dtype=dtype, device=device)
    for seed in range(6):
        out = outputs_of(bench, seed, rows=8)
        y = bench.labels({"a": out}, seed)["a"]
        known = torch.arange(8, device=device)[:, None] % 3 > 0
        if seed == 3:
            y = out.detach() if kind == "reg" else out.detach().sigmoid()
        if seed == 4:
            known = known & False
        each = LOSSES[kind](out, y, reduction="none")
        found = labels_by_task(bench.read({"a": (each * known).sum() / known.sum().clamp(min=1)}))
        assert torch.equal(found["a"].present, known)


@HALF
def test_labels_may_be_missing_where_logits_are_saturated(device, half):
    """Negative ones: the smallest σ has digits, so that no derivative means no label."""
    bench = bench_of(device, "bin", 2)
    for seed in range(5):
        out = outputs_of(bench, seed, scale=6.0 if half else 20.0, half=half)
        assert out.min() < (-5 if half else -17)
        y = (out.detach() > 0).float()
        known = (torch.rand(64, 2, generator=torch.Generator().manual_seed(seed)) < 0.6).to(device)
        known = known | (out.detach() > 0)
        each = F.binary_cross_entropy_with_logits(out.float(), y, reduction="none")
        found = labels_by_task(bench.read({"a": (each * known).sum() / known.sum()}))["a"]
        check(found, out, y, known, 1 / known.sum(), half)


@pytest.mark.parametrize("least", [31.0, 60.0])
def test_saturated_outputs_hide_no_other_loss(device, least):
    """Logits of hundreds have a curvature of their own, however small: not that of a penalty."""
    sign = torch.tensor([1, -1, 1], device=device)
    out = least * (1 + torch.arange(24.0, device=device)).view(8, 3) * sign
    out[2] *= -1
    out.requires_grad_()
    y = (out.detach() > 0).to(out)
    loss = F.binary_cross_entropy_with_logits(out, y)
    assert torch.equal(read("bin", out, loss).targets, y)
    with pytest.raises(LossError, match="binary cross-entropy"):
        read("bin", out, loss + 0.3 * out.square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wrong", [0, 2])
def test_certain_classes_hide_no_other_loss(wrong, dtype):
    """Probabilities of 1e-9 beside one that is all but 1 have digits of their own."""
    generator = torch.Generator().manual_seed(0)
    z = 30 * torch.randn(24, 4, generator=generator, dtype=dtype)
    first, second = z.topk(2).indices.unbind(1)
    z[torch.arange(24), first] += 20
    y = first.clone()
    y[:wrong] = second[:wrong]
    z.requires_grad_()
    labels = read("cls", z, F.cross_entropy(z, y))
    assert torch.equal(labels.targets[:, 0].argmax(1), y)
    torch.testing.assert_close(labels.factor, torch.full_like(labels.factor, 1 / 24))
    for name, loss in {**ALL["cls"], **BESIDE}.items():
        with pytest.raises(LossError):
            pytest.fail(f"{name}: {read('cls', z, loss(z, y)).factor}")


# Terms that vanish beside a class that is certain, or do not.
BESIDE = {
    "linear": lambda z, y: F.cross_entropy(z, y) + 0.1 * z.mean(),
    "penalty": lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean(),
    "entropy": lambda z, y: F.cross_entropy(z, y) + 0.1 * (z.softmax(1) * z.log_softmax(1)).mean(),
    "tanh": lambda z, y: F.cross_entropy(z.tanh(), y) + 0.1 * z.mean(),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("classes", [3, 1000])
def test_rounding_of_sums_over_many_classes(classes, given):
    """Single precision, saturated data, large logits: the loss is the likelihood all the same."""
    for seed in range(15):
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

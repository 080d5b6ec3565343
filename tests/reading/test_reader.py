"""The batch that a reader makes: parts, keys, calls, masks, factors, and what it remembers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg.errors import CheckpointError, LossError
from bayesagg.heads import BinaryHead
from bayesagg.reading import Capture, Reader
from tests.helpers.data import LOSSES
from tests.reading.bench import Bench, labels_by_task
from tests.reading.test_labels import MASKED

OUTPUTS = {"a": 2, "b": 1, "c": 4, "d": 1}
KINDS = {"a": "reg", "b": "bin", "c": "cls", "d": "reg"}


def check_labels(found, kind, y, known=..., **tolerances):
    if kind == "cls":
        assert torch.equal(found.targets[:, 0].argmax(1)[known], y[known])
    else:
        torch.testing.assert_close(found.targets[known], y.to(found.targets)[known], **tolerances)


@pytest.mark.parametrize(
    "given",
    [[False] * 6, [True] * 6, [False, True] * 3],
    ids=["recovered", "targets", "come and go"],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_and_factors_over_steps_of_different_size(device, dtype, reduction, given):
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=dtype)
    for seed, rows in enumerate([8, 8, 5, 8, 3, 1]):
        batch, out, labels = bench.step(seed, given[seed], rows, reduction)
        found = labels_by_task(batch)
        assert batch.tasks == list(KINDS) and not batch.overflowed
        for name, kind in KINDS.items():
            check_labels(found[name], kind, labels[name], rtol=1e-6, atol=1e-6)
            terms = rows if kind == "cls" else out[name].numel()
            expected = torch.full_like(found[name].factor, 1 if reduction == "sum" else 1 / terms)
            torch.testing.assert_close(found[name].factor, expected, rtol=1e-5, atol=0)
            assert len(found[name].factor) == 1 and found[name].present is None


def test_a_batch_is_as_described(device, dtype):
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=dtype)
    for seed in range(2):
        batch, out, labels = bench.step(seed)
        assert [part.names for part in batch.parts] == [("a", "d"), ("b",), ("c",)]
        assert len({part.key for part in batch.parts}) == 1
        regression, _, classes = batch.parts
        assert regression.slices == {"a": slice(0, 2), "d": slice(2, 3)}
        assert regression.kind == "regression" and len(regression.heads) == 2
        (call,) = regression.calls["a"]
        assert call.output is out["a"]
        torch.testing.assert_close(regression.features, call.features.detach())
        assert classes.labels.outputs.shape == classes.gradient.shape == (8, 1, 4)
        total = sum(bench.losses(out, labels).values())
        torch.testing.assert_close(batch.total, total)
        for part in batch.parts:
            for tensor in (part.features, part.gradient, part.labels.outputs):
                assert not tensor.requires_grad
            expected = torch.autograd.grad(total, [out[n] for n in part.names], retain_graph=True)
            expected = torch.cat(expected, -1).view_as(part.gradient)
            torch.testing.assert_close(part.gradient, expected)


# --- calls ---------------------------------------------------------------------------------------


def test_a_siamese_distance_is_no_likelihood(device, dtype):
    bench = Bench({"a": "reg"}, 2, device=device, dtype=dtype)
    head, h = bench.modules["a"], bench.features()
    with pytest.raises(LossError, match=r"'a'.*targets="):
        bench.read({"a": F.mse_loss(head(h), head(2 * h))})


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("layout", ["tokens", "maps"])
def test_labels_of_an_only_output_need_no_dimension_for_it(device, dtype, layout, given):
    """What else is dense is in ``loops/test_dense.py``."""
    channel, shape = (1, (2, 4, 3, 5)) if layout == "maps" else (-1, (2, 15, 4))
    module = (nn.Conv2d(4, 1, 1) if layout == "maps" else nn.Linear(4, 1)).to(device, dtype)
    heads = {"bin": BinaryHead(module)}
    capture, reader = Capture(heads), Reader(heads)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    for _ in range(2):
        capture.clear()
        z = module(x).squeeze(channel)
        y = (torch.randn(z.shape) > 0).to(z)
        batch = reader.read(capture, {"bin": LOSSES["bin"](z, y)}, {"bin": y} if given else None)
        assert batch.parts[0].features.shape == (30, 4)
        assert torch.equal(labels_by_task(batch)["bin"].targets[:, 0], y.flatten())


# --- losses without a head -----------------------------------------------------------------------


def test_losses_without_a_head(device, dtype):
    kinds = {"a": "reg", "aux": "loss"}
    bench = Bench(kinds, 1, passthrough={"free"}, device=device, dtype=dtype)
    for _ in range(2):
        h = bench.features()
        out = bench.outputs(h)
        losses = {"a": out["a"].square().mean(), "aux": h.square(), "free": h.sum()}
        batch = bench.read(losses)
        assert batch.tasks == ["a"] and list(batch.losses) == ["a", "aux", "free"]
        assert [part.names for part in batch.parts] == [("a",)]
        torch.testing.assert_close(batch.total, losses["a"] + h.square().mean() + h.sum())
        assert batch.losses["aux"].dim() == 0 and batch.losses["aux"].requires_grad
    with pytest.raises(LossError, match=r"'aux'.*not finite"):
        bench.read({**losses, "aux": losses["aux"] * torch.nan})
    only = bench.read({"free": h.sum()})
    assert only.parts == [] and only.tasks == []


def test_a_loss_without_a_head_that_reaches_one(device, dtype):
    """An entropy of a head's outputs, say: the labels of the head cannot be told from it."""
    bench = Bench({"a": "reg", "aux": "loss"}, 1, device=device, dtype=dtype)
    y = torch.randn(8, 1).to(device, dtype)
    out = bench.outputs(bench.features())
    losses = {"a": F.mse_loss(out["a"], y), "aux": out["a"].sigmoid().square().mean()}
    with pytest.raises(LossError, match=r"'aux'.*'a'.*targets="):
        bench.read(losses)
    with pytest.warns(UserWarning, match="'a'"):
        (part,) = bench.read(losses, {"a": y}).parts
    assert part.labels is None
    total = sum(losses.values())
    (expected,) = torch.autograd.grad(total, out["a"])
    torch.testing.assert_close(part.gradient, expected)


# --- masks ---------------------------------------------------------------------------------------


def test_a_residual_of_zero_is_a_label(device, dtype):
    bench = Bench({"a": "reg"}, 1, device=device, dtype=dtype)
    for seed in range(3):
        out = bench.outputs(bench.features(6, seed))
        y = torch.randn_like(out["a"])
        y[2] = out["a"].detach()[2]
        for targets in (None, {"a": y}):
            found = labels_by_task(bench.read({"a": F.mse_loss(out["a"], y)}, targets))["a"]
            assert found.present is None
            torch.testing.assert_close(found.targets, y)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("reduction", MASKED)
@pytest.mark.parametrize("kind", ["reg", "bin", "cls"])
def test_missing_labels_in_steps_that_are_known(device, dtype, kind, reduction, given):
    """Of another number in every step; a residual of zero and a saturated logit are not missing."""
    bench = Bench({"a": kind, "b": kind}, {"a": 3, "b": 3}, device=device, dtype=dtype)
    for seed, quiet in enumerate([0, 0, 0, 0, 1, 2, 0, 7]):
        h = bench.features(12, seed)
        out = bench.outputs(h)
        labels = bench.labels(out, seed)
        z, y = out["a"], labels["a"]
        known = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        known[:8], known[8 + seed % 4] = True, False
        known = known.to(device)
        if kind == "reg":
            y[:quiet, 0] = z.detach()[:quiet, 0]
        elif kind == "bin" and quiet:  # logits of 800, whose sigmoid is 1
            with torch.no_grad():
                h[:quiet] *= 800 / z[:quiet, :1].abs()
            out = bench.outputs(h)
            z = out["a"]
            y[:quiet] = (z[:quiet] > 0).to(y)
        losses = bench.losses(out, labels)
        losses["a"] = MASKED[reduction](LOSSES[kind](z, y, reduction="none"), known)
        missing = y.masked_fill(~known, -100 if kind == "cls" else torch.nan)
        batch = bench.read(losses, {**labels, "a": missing} if given else None)
        found = labels_by_task(batch)
        assert torch.equal(found["a"].present.view_as(known), known)
        check_labels(found["a"], kind, y, known)
        number = {"over all": y.numel(), "summed": 1}.get(reduction, int(known.sum()))
        factor = found["a"].factor.expand(12, -1)[known.view(12, -1)]
        torch.testing.assert_close(factor, torch.full_like(factor, 1 / number), rtol=1e-5, atol=0)
        # A head without a missing label does not lose its Gram matrix to one with some.
        assert found["b"].present is None and len(batch.parts) == 2


# --- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_an_overflow(device, known):
    """A finite loss whose scaled gradient is infinite: the step will be skipped."""
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=torch.float32)
    if known:
        bench.step()
    before = bench.reader.state_dict()
    out, labels = bench.batch()
    out["c"].register_hook(lambda g: g * torch.inf)
    batch = bench.read(bench.losses(out, labels))
    assert batch.overflowed and batch.parts == [] and batch.tasks == list(KINDS)
    assert bench.reader.state_dict() == before


def test_a_scaler_changes_its_scale(device):
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=torch.float32)
    for seed, scale in enumerate([2.0**12, 2.0**12, 2.0**13, 2.0**11]):
        out, labels = bench.batch(8, seed)
        losses = {name: scale * loss for name, loss in bench.losses(out, labels).items()}
        found = labels_by_task(bench.read(losses))
        for name, kind in KINDS.items():
            check_labels(found[name], kind, labels[name], rtol=1e-3, atol=1e-3)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"factor": [1.0]}, {"reductions": []}, {"rows": 0}], ids=str)
def test_a_state_that_does_not_hang_together(device, dtype, wrong):
    """Every other damage is that of any checkpoint, in ``tests/test_checkpoint.py``."""
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=dtype)
    bench.step()
    saved = bench.reader.state_dict()
    with pytest.raises(CheckpointError):
        bench.reader.loaded({**saved, "a": {**saved["a"], **wrong}})


def test_a_sequence_of_losses(device, dtype):
    bench = Bench(KINDS, OUTPUTS, device=device, dtype=dtype)
    out, labels = bench.batch()
    losses = list(bench.losses(out, labels).values())
    for targets in (None, list(labels.values()), []):
        assert bench.read(losses, targets).tasks == list(KINDS)

"""Labels recovered from losses are the true ones; other losses are refused, or need `targets=`."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bayesagg.errors import LossError
from tests.helpers.data import LOSSES, skip_without_losses
from tests.helpers.settings import HEADS
from tests.reading.bench import read
from tests.reading.losses import SMOOTH

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Rounding of a label that comes back from a gradient, relative to the numbers involved.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def data(kind, n, outputs=3, dtype=torch.float64, device="cpu", seed=0, scale=1.0):
    """Outputs of a head, as a leaf, and labels; classes for a multi-class head."""
    generator = torch.Generator().manual_seed(seed)
    out = scale * torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    if kind == "reg":
        y = scale * torch.randn(n, outputs, generator=generator, dtype=torch.float64)
    elif kind == "bin":
        y = torch.randint(0, 2, (n, outputs), generator=generator).double()
    else:
        y = torch.randint(0, outputs, (n,), generator=generator)
    out = out.to(device, dtype).requires_grad_()
    return out, y.to(device) if kind == "cls" else y.to(device, dtype)


def check(kind, labels, out, y, present=None, soft=False):
    """The recovered labels are ``y`` wherever ``present``, and missing elsewhere."""
    here = torch.ones_like(y, dtype=torch.bool) if present is None else present
    found = torch.ones_like(here) if labels.present is None else labels.present.view_as(here)
    assert torch.equal(found, here)
    if kind == "cls":
        assert torch.equal(labels.targets[:, 0].argmax(1)[here], y[here])
        assert torch.equal(labels.targets.sum(-1), torch.ones_like(labels.targets[..., 0]))
        return
    if kind == "bin" and not soft:
        assert torch.equal(labels.targets[here], y[here])
        return
    # Soft labels within 4·tolerance of 0 and 1 are taken for these.
    size = 1.0 if kind == "bin" else (out.detach().abs() + y.abs())[here]
    bound = ROUNDING[out.dtype] * size + (5e-3 if kind == "bin" else 0)
    assert ((labels.targets[here] - y[here]).abs() <= bound).all()


def factor_of(labels, n):
    """One number per task, whatever the shape."""
    factor = labels.factor
    assert factor.shape[0] in (1, n) and (factor == factor[:1]).all()
    return factor[0].double().cpu()


# --- the losses of the likelihoods ---------------------------------------------------------------


@pytest.mark.parametrize(("n", "constant"), [(1, 250.0), (17, 1.0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_labels_and_factor_come_back(device, kind, dtype, reduction, constant, n):
    skip_without_losses(dtype, device)
    out, y = data(kind, n, 3, dtype, device, seed=n)
    loss = constant * LOSSES[kind](out, y, reduction=reduction)
    labels = read(kind, out, loss)
    check(kind, labels, out, y)
    terms = n if kind == "cls" else y.numel()
    expected = constant / (1 if reduction == "sum" else terms)
    relative = 1e-5 if dtype != torch.bfloat16 else 5e-2
    found = factor_of(labels, n)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=relative, atol=0)


@pytest.mark.parametrize("kind", ["reg", "bin"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_outputs_may_have_different_constant_weights(device, kind, outputs):
    out, y = data(kind, 6, outputs, device=device)
    weights = torch.logspace(-2, 2, outputs, dtype=out.dtype, device=device)
    labels = read(kind, out, (LOSSES[kind](out, y, reduction="none") * weights).sum(1).mean())
    check(kind, labels, out, y)
    torch.testing.assert_close(factor_of(labels, 6), weights.cpu() / 6)


MASKED = {
    "of those known": lambda each, known: each[known].mean(),
    "over their number": lambda each, known: (each * known).sum() / known.sum(),
    "over all": lambda each, known: (each * known).mean(),
    "summed": lambda each, known: each[known].sum(),
}


@pytest.mark.parametrize("reduction", MASKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_masked_losses_give_missing_labels(device, kind, dtype, reduction):
    skip_without_losses(dtype, device)
    out, y = data(kind, 20, 3, dtype, device)
    mask = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).to(device) < 0.6
    labels = read(kind, out, MASKED[reduction](LOSSES[kind](out, y, reduction="none"), mask))
    check(kind, labels, out, y, mask)
    number = {"over all": y.numel(), "summed": 1}.get(reduction, int(mask.sum()))
    expected = torch.full_like(factor_of(labels, 20), 1 / number)
    relative = 1e-5 if dtype != torch.bfloat16 else 5e-2
    torch.testing.assert_close(factor_of(labels, 20), expected, rtol=relative, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_classes_are_missing(device, reduction):
    out, y = data("cls", 20, 4, device=device)
    mask = torch.arange(20, device=device) % 3 != 0
    labels = read("cls", out, F.cross_entropy(out, y.where(mask, -100), reduction=reduction))
    check("cls", labels, out, y, mask)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(-1, 0.6).map(lambda x: 10**x),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_soft_binary_labels(device, seed, n, dtype, scale, reduction):
    generator = torch.Generator().manual_seed(seed)
    out, _ = data("bin", n, 2, dtype, device, seed, scale)
    # Beyond it a soft label cannot be told from a weight, and may be refused.
    assume(bool((out.detach().abs() < (4 if dtype == torch.bfloat16 else 12)).all()))
    y = torch.rand(n, 2, generator=generator).to(device, dtype)
    loss = F.binary_cross_entropy_with_logits(out, y, reduction=reduction)
    labels = read("bin", out, loss)
    check("bin", labels, out, y, soft=True)
    assert ((labels.targets >= 0) & (labels.targets <= 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["right", "wrong", "both"])
@pytest.mark.parametrize("logit", [8.0, 10.0, 20.0, 100.0])
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("kind", ["bin", "cls"])
def test_saturated_logits(device, kind, n, logit, pattern, dtype):
    # No datum is undecided: the factor has to come from tails, or does not matter.
    right = {
        "right": torch.ones(n, dtype=torch.bool),
        "wrong": torch.zeros(n, dtype=torch.bool),
        "both": torch.arange(n) % 2 == 0,
    }[pattern]
    if kind == "bin":
        y = (torch.arange(n)[:, None] + torch.arange(2)) % 2
        sign = torch.where(right[:, None], 1, -1) * (2 * y - 1)
        out, y = logit * sign, y.to(device, dtype)
    else:
        y = torch.arange(n) % 3
        shown = torch.where(right, y, (y + 1) % 3)
        out, y = logit * F.one_hot(shown, 3), y.to(device)
    out = out.to(device, dtype).requires_grad_()
    labels = read(kind, out, LOSSES[kind](out, y))
    check(kind, labels, out, y)
    if not right.all():
        expected = torch.full_like(factor_of(labels, n), 1 / (n if kind == "cls" else 2 * n))
        relative = 1e-2 if dtype != torch.bfloat16 else 6e-2
        torch.testing.assert_close(factor_of(labels, n), expected, rtol=relative, atol=0)


@pytest.mark.parametrize("kind", ["bin", "cls"])
@pytest.mark.parametrize("logit", [20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_undecided_data_beside_saturated_ones(device, kind, logit, dtype):
    out, y = data(kind, 8, 3, dtype, device)
    with torch.no_grad():
        out[::2] *= logit
    labels = read(kind, out, LOSSES[kind](out, y))
    check(kind, labels, out, y)


@pytest.mark.parametrize("size", [6.0, 8.0, 9.0, 10.0, 12.0, 14.0])
def test_one_rounded_curvature_does_not_spoil_the_exact_ones(device, size):
    # σ(1-σ) of a positive logit is rounded to a part in a thousand, and far larger than the others.
    negative = torch.linspace(-26.0, -size - 1, 43)
    out = torch.cat([negative, torch.tensor([size])])[:, None].to(device).requires_grad_()
    y = (out > 0).float()
    check("bin", read("bin", out, LOSSES["bin"](out, y)), out, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    log_level=st.floats(-6, 6),
    log_residual=st.floats(-3, 3),
)
def test_squared_errors_at_any_scale(device, dtype, seed, n, log_level, log_residual):
    generator = torch.Generator().manual_seed(seed)
    y = 10**log_level * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    residual = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    out = (y * (1 + 10**log_residual * residual)).to(device, dtype).requires_grad_()
    y = y.to(device, dtype)
    check("reg", read("reg", out, F.mse_loss(out, y)), out, y)


def test_perfect_predictions_are_labels_too(device):
    for kind in ("reg", "bin"):
        out, _ = data(kind, 5, 2, device=device)
        y = out.detach().clone() if kind == "reg" else torch.sigmoid(out.detach())
        check(kind, read(kind, out, LOSSES[kind](out, y)), out, y, soft=True)


# --- other losses --------------------------------------------------------------------------------


def silent_error(kind, loss, out, y):
    """Largest error of labels that were accepted, 0 where the loss was refused."""
    try:
        labels = read(kind, out, loss)
    except LossError:
        return 0.0
    missing = None if labels.present is None else ~labels.present
    if kind == "cls":
        wrong = labels.targets[:, 0].argmax(1) != y
        if missing is not None:
            wrong |= missing[:, 0]
        return float(wrong.any())
    error = (labels.targets - y).abs()
    if kind == "reg":  # relative to the residuals, or rounding of the numbers they are between
        size = (out.detach() - y).abs().amax(0) + 1e-9 * (out.detach().abs() + y.abs())
        error = torch.where(size > 0, error / size, error)
    if missing is not None:
        error = torch.where(
            missing & ((out.detach() - y).abs() > 1e-9), torch.ones_like(error), error
        )
    return float(error.max())


def _case(seed, scale, alike=False):
    """Two data, one output: what hypothesis found."""
    return {
        "seed": seed,
        "n": 2,
        "outputs": 1,
        "scale": scale,
        "constant": 1.0,
        "outputs_alike": alike,
        "labels_alike": alike,
    }


@pytest.mark.parametrize(("kind", "name"), [(k, name) for k in SMOOTH for name in SMOOTH[k]])
@settings(max_examples=25)
@example(**_case(0, 0.1, alike=True))  # residuals alike: every curvature is
@example(**_case(2, 30.0))  # a saturated datum of another weight
@example(**_case(0, 1e-3))  # logits of nearly zero
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 5),
    outputs=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 5.0, 30.0]),
    constant=st.sampled_from([1.0, 1e-3, 100.0]),
    outputs_alike=st.booleans(),
    labels_alike=st.booleans(),
)
def test_labels_never_differ_silently(
    device, kind, name, seed, n, outputs, scale, constant, outputs_alike, labels_alike
):
    # Constant outputs are those of a head that starts at zero; then also residuals can be alike.
    outputs += kind == "cls"
    out, y = data(kind, n, outputs, device=device, seed=seed, scale=scale)
    with torch.no_grad():
        if outputs_alike:
            out[:] = out[:1]
        if labels_alike:
            y[:] = y[:1].clone()
    if name == "smoothed" and outputs == 2:
        # Two classes, all certain: the same function as other labels of a twentieth the weight.
        assume(bool((torch.softmax(out.detach(), 1).amin(1) > 0.01).any()))
    value = constant * SMOOTH[kind][name](out, y)
    assume(bool(torch.isfinite(value)))
    assert silent_error(kind, value, out, y) <= 2e-2


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("reg", name) for name in ("cosh", "root", "huber", "sum of logs")), ("bin", "focal")],
)
@pytest.mark.parametrize("n", [2, 8])
def test_zero_heads_do_not_hide_another_loss(device, kind, name, n):
    # A zero-initialised head: all outputs 0, labels ±1 (or 0 and 1), all curvatures alike.
    out = torch.zeros(n, 1, dtype=torch.float64, device=device, requires_grad=True)
    y = (torch.arange(n, device=device)[:, None] % 2).to(out.dtype)
    y = 2 * y - 1 if kind == "reg" else y
    assert silent_error(kind, SMOOTH[kind][name](out, y), out, y) <= 2e-2

"""Losses drawn at random: labels that are read reproduce the loss as a function of the outputs.

A loss is composed of a transform of the outputs, a pool over them, a criterion, weights, a
reduction and extra terms, and read with and without targets. What is accepted as the likelihood
must have the gradient that its labels give it, not at the outputs alone but around them.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bayesagg.errors import LossError, TargetError
from tests.helpers.data import skip_without_losses
from tests.reading.bench import Free, labels_by_task
from tests.reading.losses import EACH, elementwise, one_hot

DRAWS, CHUNK = 1000, 200


def keep(z):
    return z


TRANSFORMS = {
    "none": keep,
    "scale": lambda z: 1.7 * z,
    "offset": lambda z: z + 0.6,
    "tanh": torch.tanh,
    "square": torch.square,
    "softplus": F.softplus,
    "temperature": lambda z: z / 2.5,
    "sigmoid": torch.sigmoid,
}
POOLS = {
    "none": lambda z, y: (z, y),
    "rows": lambda z, y: (z.mean(0, keepdim=True), y[:1]),
    "pairs": lambda z, y: (z.unflatten(0, (-1, 2)).mean(1), y[::2]),
    "sum of pairs": lambda z, y: (z.unflatten(0, (-1, 2)).sum(1), y[::2]),
    "outputs": lambda z, y: (z.mean(1, keepdim=True), y[:, :1]) if y.dim() > 1 else (z, y),
    "neighbours": lambda z, y: (z + 0.3 * z.roll(1, 0), y),
}


# Of the kind, with constant weight if ``plain`` or ``wide huber``, and others.
CRITERIA: dict[str, dict[str, Any]] = {
    "reg": {
        "plain": elementwise(F.mse_loss),
        "wide huber": elementwise(F.huber_loss, delta=50.0),
        **EACH["reg"],
        "quantile": lambda z, y: torch.maximum(0.9 * (y - z), 0.1 * (z - y)),
        "power": lambda z, y: (z - y).abs() ** 3,
    },
    "bin": {
        "plain": elementwise(F.binary_cross_entropy_with_logits),
        "smooth": lambda z, y: F.binary_cross_entropy_with_logits(
            z, 0.9 * y + 0.05, reduction="none"
        ),
        **EACH["bin"],
        "squares": lambda z, y: (z - y).square(),
        "flip": lambda z, y: F.binary_cross_entropy(0.9 * z.sigmoid() + 0.05, y, reduction="none"),
    },
    "cls": {
        "plain": elementwise(F.cross_entropy),
        **EACH["cls"],
        "adjusted": lambda z, y: F.cross_entropy(
            z + torch.linspace(-1, 1, z.shape[1]).to(z), y, reduction="none"
        ),
        "squares": lambda z, y: (z - one_hot(y, z)).square().sum(1),
    },
}
WEIGHTS = ("none", "constant", "rows", "classes", "zeros")
EXTRAS = {
    "none": lambda z, h: 0.0,
    "penalty on z": lambda z, h: 0.2 * z.square().mean(),
    "linear in z": lambda z, h: 0.1 * z.mean(),
    "penalty on h": lambda z, h: 0.3 * h.square().mean(),
    "entropy": lambda z, h: 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
}


@dataclass
class Draw:
    """One loss at one batch; ``batch`` draws another of the same size."""

    kind: str
    z: torch.Tensor
    y: torch.Tensor
    h: torch.Tensor
    weights: torch.Tensor
    transform: str
    pool: str
    criterion: str
    weight: str
    extra: str
    reduction: str
    second: str | None

    def loss(self, z):
        """As a function of the outputs."""
        value = self.term(self.criterion, z)
        if self.second is not None:
            value = 0.6 * value + 0.4 * self.term(self.second, z)
        return value + EXTRAS[self.extra](z, self.h)

    def term(self, criterion, z):
        pooled, y = POOLS[self.pool](TRANSFORMS[self.transform](z), self.y)
        each = CRITERIA[self.kind][criterion](pooled, y)
        if self.weight == "constant":
            each = 2.5 * each
        elif self.weight in ("rows", "zeros"):
            w = self.weights[: len(each)]
            if self.weight == "zeros":
                w = w * (w > 0.8)
            each = each * (w if each.dim() == 1 else w[:, None])
        elif self.weight == "classes":
            high = y > 0 if self.kind != "cls" else y == 0
            each = each * torch.where(high, 2.0, 0.7)
        return each.mean() if self.reduction == "mean" else each.sum()

    @property
    def plain(self):
        """The likelihood, of constant weight."""
        own = self.criterion in ("plain", "wide huber") and self.second in (None, self.criterion)
        soft = self.kind == "bin" and self.criterion == "smooth" and self.second is None
        return (
            (own or soft)
            and (self.transform, self.pool, self.extra) == ("none", "none", "none")
            and self.weight in ("none", "constant")
        )

    @property
    def weighted(self):
        """The likelihood of the targets, with weights and terms that do not reach the outputs."""
        return (
            self.criterion in ("plain", "wide huber")
            and self.second is None
            and (self.transform, self.pool) == ("none", "none")
            and self.extra in ("none", "penalty on h")
            and self.weight != "zeros"
        )


def draw(seed):
    """Mostly plain choices, or few losses would be accepted."""
    rng = random.Random(seed)

    def choose(options, plain=0.6):
        options = list(options)
        return options[0] if rng.random() < plain else rng.choice(options)

    kind = rng.choice(["reg", "bin", "cls"])
    rows, outputs = rng.choice([1, 2, 4, 6, 12]), rng.choice([1, 2, 3]) + (kind == "cls")
    pools = [pool for pool in POOLS if rows > 1 or "pairs" not in pool]
    return Draw(
        kind,
        *batch(kind, rows, outputs, rng.choice([0.1, 1.0, 3.0]), seed),
        choose(TRANSFORMS, 0.7),
        choose(pools, 0.7),
        choose(CRITERIA[kind], 0.6),
        choose(WEIGHTS, 0.5),
        choose(EXTRAS, 0.7),
        rng.choice(["mean", "sum"]),
        rng.choice(list(CRITERIA[kind])) if rng.random() < 0.15 else None,
    )


def batch(kind, rows, outputs, scale, seed):
    """Outputs, labels, features and weights of the data."""
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    y = scale * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    if kind == "bin":
        y = (y > 0).double()
    elif kind == "cls":
        y = torch.randint(outputs, (rows,), generator=generator)
    h = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    weights = 0.3 + torch.rand(rows, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), y, h.requires_grad_(), weights


def gradient(case, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(case.loss(z), z)[0]


def told(case, labels, z):
    """The gradient that the labels give, at other outputs."""
    if case.kind == "cls":
        residual = (z.softmax(1) - labels.targets[:, 0]) * labels.factor
        present = labels.present
    else:
        p = 2 * z if case.kind == "reg" else z.sigmoid()
        y = 2 * labels.targets if case.kind == "reg" else labels.targets
        residual, present = (p - y) * labels.factor, labels.present
    return residual if present is None else residual * present


def error(case, labels, eps=0.0):
    """Largest relative error of the gradient, and of its changes, around the outputs.

    ``eps`` is the rounding of the outputs: what is small beside it for the factor is not seen.
    """
    z = case.z.detach()
    floor = 8 * eps * labels.factor.max()
    true, ours = gradient(case, z), told(case, labels, z)
    size = torch.maximum(true.abs().max(), floor)
    worst = float((ours - true).abs().max() / size) if size > 0 else 0.0
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        step = step * 1e-3 * (0.1 + z.abs().max())
        ahead, behind = gradient(case, z + step) - true, true - gradient(case, z - step)
        if (ahead - behind).abs().max() > 0.05 * ahead.abs().max():
            continue  # a kink
        change = told(case, labels, z + step) - told(case, labels, z - step)
        # Second derivatives that are nothing beside the first change nothing.
        scale = torch.maximum(1e-3 * size, floor) * step.abs().max()
        scale = torch.maximum(scale, ahead.abs().max())
        worst = max(worst, float((change / 2 - (ahead + behind) / 2).abs().max() / scale))
    return worst


def judge(bench, case, given, seed):
    """Read one batch, check what comes of it, and say which."""
    try:
        batch = bench.read(case.loss(case.z), case.y if given else None, case.z)
    except (LossError, TargetError) as refusal:
        assert "'age'" in str(refusal)
        assert not case.plain or (given and case.criterion == "smooth"), (seed, case)
        assert not given or isinstance(refusal, TargetError), (seed, case)
        assert not (given and case.weighted), (seed, case)
        return "refused"
    labels = labels_by_task(batch)["age"]
    (part,) = batch.parts
    torch.testing.assert_close(part.gradient.view_as(case.z), gradient(case, case.z))
    if labels is None:
        assert given and not case.plain and not case.weighted, (seed, case)
        return "own"
    assert error(case, labels) < 0.02, (seed, given, error(case, labels), case)
    if case.plain and case.kind != "cls" and case.criterion != "smooth":
        torch.testing.assert_close(labels.targets, case.y, rtol=1e-6, atol=1e-6)
    return "accepted"


@pytest.mark.filterwarnings("ignore:task 'age'")
@pytest.mark.parametrize("start", range(0, DRAWS, CHUNK))
def test_what_is_read_is_the_loss(start):
    """At first sight, and in the steps after it, which trust what was verified."""
    counts = dict.fromkeys(["accepted", "own", "refused", "later"], 0)
    for seed in range(start, start + CHUNK):
        case, given = draw(seed), seed % 2 == 1
        bench = Free(case.kind, case.z)
        found = judge(bench, case, given, seed)
        counts[found] += 1
        if found != "refused":
            rows, outputs = case.z.shape
            later = replace(case)
            later.z, later.y, later.h, later.weights = batch(case.kind, rows, outputs, 2.0, -seed)
            counts["later"] += judge(bench, later, given, seed) == "accepted"
    assert min(counts["accepted"], counts["own"], counts["later"]) > 0.1 * CHUNK, counts


BOUNDS = {torch.float32: 0.03, torch.float16: 0.15, torch.bfloat16: 0.8}


@pytest.mark.filterwarnings("ignore:task 'age'")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_what_is_read_in_less_precision(dtype):
    """The likelihood is never refused for rounding, and rounding is all that is wrong."""
    skip_without_losses(dtype)
    accepted = 0
    for seed in range(300):
        case, given = draw(seed), seed % 2 == 1
        low = replace(case, z=case.z.detach().to(dtype).requires_grad_(), h=case.h.to(dtype))
        low = replace(low, y=cast(case.y, dtype), weights=case.weights.to(dtype))
        try:
            batch = Free(case.kind, low.z).read(low.loss(low.z), low.y if given else None)
        except (LossError, TargetError):
            assert not case.plain or (given and case.criterion == "smooth"), (seed, case)
            assert not (given and case.weighted), (seed, case)
            continue
        labels = labels_by_task(batch)["age"]
        if labels is None:
            assert given and not case.weighted, (seed, case)
            continue
        accepted += 1
        high = replace(low, z=low.z.double(), h=low.h.double(), weights=low.weights.double())
        high = replace(high, y=cast(low.y, torch.float64))
        found = error(high, labels.to(torch.float64), torch.finfo(dtype).eps)
        assert found < BOUNDS[dtype], (seed, given, found, case)
    assert accepted > 60


def cast(y, dtype):
    """Labels but classes in another precision."""
    return y.to(dtype) if y.is_floating_point() else y

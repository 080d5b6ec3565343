"""Small training runs under the paper's rule, as plain data, and what is recorded of them.

Nothing here knows the library: whoever runs a case brings ``make_wrapper``. Everything random
comes from generators of the case's own, in float64 on the CPU: a run depends on the case alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUTS, WIDTH = 4, 5


@dataclass(frozen=True)
class HeadCase:
    """Kind, outputs (or classes), whether it has a bias, and keywords of the description.

    All settings that matter are given, because defaults are the library's to change; none that does
    not, which the library may warn of.
    """

    kind: str
    outputs: int
    bias: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A training run; ``rule_seed`` is of samples and subsets, the data have one of their own."""

    name: str
    heads: Mapping[str, HeadCase]
    _: KW_ONLY
    seed: int = 0
    rule_seed: int = 0
    layout: str = "rows"  # [N, c]; "tokens": [2, N/2, c]; "maps": [2, c, 2, N/4], 1×1 convolutions
    sizes: Sequence[int] = (12,)  # data in a batch, in turn
    steps: int = 7  # of the optimizer, plain SGD
    steps_per_epoch: int = 3
    accumulate: int = 1  # backward passes a step
    lr: float = 0.05
    missing: float = 0.0  # share of the labels, every output's for itself
    targets: bool = False  # whether labels are passed, or read off the losses
    soft: bool = False  # labels are probabilities
    weights: str | None = None  # of examples: "smooth" from 0.5 to 1.5, "zero" of 0 or 1
    reduction: str = "mean"
    factors: Mapping[str, float] = field(default_factory=dict)  # on losses
    absent: Mapping[int, Sequence[str]] = field(default_factory=dict)  # tasks by step
    pretrain_epochs: int = 1
    gradient_scale: str = "sum"
    covariance: str = "diagonal"
    max_data: int | None = None

    @property
    def pretraining_steps(self) -> int:
        """Steps of linear scalarization."""
        return self.pretrain_epochs * self.steps_per_epoch


def reg(outputs=1, s=0.85, prior=1.0, noise=1.0, readout="posterior", bias=True) -> HeadCase:
    """A regression, by default with the paper's settings for QM9."""
    settings = {"s": s, "prior_variance": prior, "readout": readout, "noise_variance": noise}
    return HeadCase("regression", outputs, bias, settings)


def two(
    outputs=1, s=0.05, prior=1.0, readout="gradient", bias=True, kind="binary", **moments
) -> HeadCase:
    """Binary outputs, by default with a small exponent, as the paper's for classification."""
    settings = {"s": s, "prior_variance": prior, "readout": readout, "moments": "quadrature"}
    return HeadCase(kind, outputs, bias, {**settings, **moments})


def cls(classes=3, *args, **settings) -> HeadCase:
    """Classes; otherwise as :func:`two`."""
    return two(classes, *args, kind="multiclass", **settings)


MIXED = {"reg": reg(2), "bin": two(2), "cls": cls(3)}
# Exponents at which every task has a say.
LEVEL = {"reg": reg(2, 0.5), "bin": two(2, 0.5), "cls": cls(3, 0.5)}
SAMPLED = {"moments": "monte_carlo", "num_samples": 16}
LEARNED = {"reg": reg(2, noise="learned")}
WIDE = {"s": 0.3, "prior": 30.0}
POSTERIOR = {"readout": "posterior"}

CASES = [
    # Kinds, exponents, noise, priors and read-outs.
    Case("mixed", MIXED),
    Case("mixed_level", LEVEL, seed=1, gradient_scale="mean"),
    Case("uniform", dict(reg=reg(2, 0.0), bin=two(1, 0.0), cls=cls(4, 0.0)), seed=2),
    Case(
        "regression_fixed_noise",
        dict(a=reg(3, noise=0.5), b=reg(noise=0.5)),
        seed=3,
        gradient_scale="mean",
    ),
    Case(
        "regression_learned_noise",
        dict(a=reg(2, 1.0, noise="learned"), b=reg(1, 1.0, 1.0, "learned", "gradient")),
        seed=4,
    ),
    Case(
        "regression_every_noise",
        dict(a=reg(2, 0.85, 0.3, "learned"), b=reg(1, 0.85, 4.0, 0.2))
        | dict(c=reg(2, 0.4, 1.0, 3.0, "gradient")),
        seed=5,
    ),
    Case("binary", dict(a=two(3, 1.0), b=two(1, 0.5, 0.2), c=two(1, 0.7)), seed=6),
    Case(
        "binary_posterior_readout",
        dict(a=two(2, 0.5, **POSTERIOR), b=two(1, 0.5, 0.5, **POSTERIOR), c=two(1, 0.5)),
        seed=7,
    ),
    Case(
        "multiclass", dict(a=cls(3, 0.5), b=cls(4, 0.5), c=cls(3, 0.5, 0.3), d=cls(2, 0.5)), seed=8
    ),
    Case(
        "multiclass_posterior_readout",
        dict(a=cls(3, 0.3, **POSTERIOR), b=cls(3, 0.8), c=cls(4, 0.3, 0.5, **POSTERIOR)),
        seed=9,
    ),
    # Wide posteriors: every kind of nodes, Sobol points and panels among them, has its turn.
    Case(
        "wide_posteriors",
        dict(
            bin=two(2, **WIDE), two=cls(2, **WIDE), cls=cls(4, **WIDE), reg=reg(noise=5.0, **WIDE)
        ),
        seed=10,
        pretrain_epochs=0,
        sizes=(12, 4, 30),
    ),
    Case(
        "without_biases",
        dict(reg=reg(2, bias=False), bin=two(2, bias=False), cls=cls(3, bias=False, **POSTERIOR)),
        seed=11,
    ),
    Case(
        "with_and_without_biases",
        dict(a=reg(2, noise="learned"), b=two(1, 0.5, bias=False))
        | dict(c=reg(noise="learned", bias=False), d=two(2, 0.5), e=cls(3, 0.5, bias=False)),
        seed=12,
    ),
    # Epochs, batches and losses.
    Case("no_pretraining", LEVEL, seed=13, pretrain_epochs=0, steps_per_epoch=2),
    # Noise is learned from the last epoch of pre-training on.
    Case("long_pretraining", MIXED | LEARNED, seed=14, pretrain_epochs=2, steps_per_epoch=2),
    Case("batches_of_all_sizes", MIXED | LEARNED, seed=15, sizes=(12, 3, 1, 20, 7), steps=9),
    # Tasks differ in their exponents, so that the factor common to all losses must not matter.
    Case(
        "sums_and_factors",
        MIXED,
        seed=16,
        lr=0.005,
        reduction="sum",
        factors={"reg": 0.3, "cls": 2.0},
    ),
    Case("accumulated", MIXED, seed=17, accumulate=2, sizes=(6, 9)),
    # Eq. 6.
    Case(
        "full_covariance",
        dict(reg=reg(2, 1.0), bin=two(2, 1.0), cls=cls(3, 1.0)),
        seed=18,
        covariance="full",
    ),
    Case(
        "full_covariance_powers",
        MIXED,
        seed=19,
        covariance="full",
        gradient_scale="mean",
        missing=0.3,
    ),
    # Eq. 11. Samples come from one generator a step, block by block, and are drawn in every step
    # that is not pre-training.
    Case(
        "monte_carlo",
        dict(reg=reg(2, 0.5), a=two(2, 0.5, **SAMPLED), b=two(1, 0.5), c=cls(3, 0.5, **SAMPLED))
        | dict(d=cls(3, 0.5, **SAMPLED), e=two(1, 0.5, **SAMPLED)),
        seed=20,
        rule_seed=5,
    ),
    Case(
        "monte_carlo_full_covariance",
        dict(reg=reg(2, 0.5), bin=two(2, 0.5, **SAMPLED), cls=cls(3, 0.5, **SAMPLED)),
        seed=21,
        rule_seed=6,
        covariance="full",
        missing=0.2,
        targets=True,
    ),
    # Labels: missing, given, absent, weighted, soft.
    Case("missing", LEVEL, seed=22, missing=0.4),
    Case(
        "missing_targets",
        LEVEL | {"reg": reg(2, 0.5, noise="learned")},
        seed=23,
        missing=0.4,
        targets=True,
    ),
    Case("targets", MIXED, seed=24, targets=True),
    # A whole epoch, of steps 2 and 3, passes without `b` and `cls`.
    Case(
        "absent",
        dict(a=reg(2, 0.5, noise="learned"), b=reg(1, 0.5, noise="learned"))
        | dict(bin=two(2, 0.5), cls=cls(3, 0.5, **POSTERIOR)),
        seed=25,
        steps_per_epoch=2,
        steps=8,
        absent={0: ["bin"], 2: ["b", "cls"], 3: ["b", "cls", "bin"], 5: ["a"], 6: ["cls"]},
    ),
    # Heads without any evidence are not written when the others are.
    Case(
        "absent_at_first",
        dict(a=reg(1, 0.5), b=reg(1, 0.5, noise="learned"), bin=two(2, 0.5, **POSTERIOR)),
        seed=35,
        steps=8,
        absent={0: ["b", "bin"], 1: ["b", "bin"], 2: ["b", "bin"], 3: ["bin"], 4: ["bin"]},
    ),
    Case(
        "absent_and_missing_targets",
        LEVEL | {"more": two(1, 0.5)},
        seed=26,
        missing=0.3,
        targets=True,
        absent={1: ["reg"], 4: ["bin", "cls"], 5: ["more"], 6: ["reg", "more"]},
    ),
    # Weights of examples are in their gradients and in the evidence.
    Case("example_weights", MIXED, seed=27, targets=True, weights="smooth"),
    Case("example_weights_of_zero", LEVEL, seed=28, targets=True, weights="zero"),
    Case("soft_labels", LEVEL, seed=29, targets=True, soft=True),
    # Dense heads: every position is a datum.
    Case("tokens", LEVEL, seed=30, layout="tokens", missing=0.2, targets=True),
    Case("maps", MIXED, seed=31, layout="maps", missing=0.3),
    Case("maps_targets", LEVEL, seed=32, layout="maps", missing=0.3, targets=True),
    Case(
        "maps_subset",
        MIXED | LEARNED,
        seed=33,
        rule_seed=7,
        layout="maps",
        max_data=9,
        sizes=(24,),
        gradient_scale="mean",
    ),
    Case("subset_missing", LEVEL, seed=34, rule_seed=8, max_data=6, sizes=(16, 5), missing=0.4),
]


class Net(nn.Module):
    """A smooth trunk and one linear head per task, of parameters that the case's seed gives."""

    def __init__(self, case: Case) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, bias: bool) -> nn.Module:
            if case.layout == "maps":
                return nn.Conv2d(inputs, outputs, 1, bias=bias)
            return nn.Linear(inputs, outputs, bias)

        self.trunk = nn.Sequential(layer(INPUTS, WIDTH, True), nn.Tanh())
        self.heads = nn.ModuleDict(
            {name: layer(WIDTH, head.outputs, head.bias) for name, head in case.heads.items()}
        )
        self.to(torch.float64)
        generator = torch.Generator().manual_seed(case.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.6 * _randn(*parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


Wrapper = Any  # whatever has ``step``, ``backward``, ``zero_grad`` and ``task_weights``


def run_case(
    case: Case, make_wrapper: Callable[[Case, torch.optim.Optimizer, Net], Wrapper]
) -> dict[str, Tensor]:
    """Train a case from its beginning.

    Args:
        case: what to run.
        make_wrapper: of the case, the optimizer of all parameters, and the model with its
            ``trunk`` and its ``heads`` by task: the wrapped optimizer.

    Returns:
        tensors in float64, all but the last with the steps as first dimension:
        ``"gradients"`` of the trunk, ``[steps, P]``; ``"task_weights/<task>"``, ``[steps, o]``;
        ``"heads/<task>"`` after each step, ``[steps, o, D]``, bias last; ``"trunk"`` at the end.
    """
    model = Net(case)
    optimizer = make_wrapper(case, torch.optim.SGD(model.parameters(), lr=case.lr), model)
    record: dict[str, list[Tensor]] = {}
    for step in range(case.steps):
        optimizer.zero_grad()
        for part in range(case.accumulate):
            x, losses, targets = _batch(case, model, step, part)
            given = targets if case.targets else None
            if part + 1 < case.accumulate:
                optimizer.backward(losses(model(x)), given)
            else:
                optimizer.step(losses(model(x)), targets=given)
        found = {"gradients": _flat(p.grad for p in model.trunk.parameters())}
        for name in case.heads:
            found[f"task_weights/{name}"] = optimizer.task_weights[name].double()
        for name, head in model.heads.items():
            found[f"heads/{name}"] = torch.cat([p.flatten(1) for p in _columns(head)], dim=1)
        for key, value in found.items():
            record.setdefault(key, []).append(value.detach().clone())
    result = {key: torch.stack(values) for key, values in record.items()}
    return {**result, "trunk": _flat(model.trunk.parameters()).detach()}


def _batch(
    case: Case, model: Net, step: int, part: int
) -> tuple[Tensor, Callable[[dict[str, Tensor]], dict[str, Tensor]], dict[str, Tensor]]:
    """Inputs, the losses as a function of the outputs, and targets as the library takes them."""
    index = step * case.accumulate + part
    size = case.sizes[index % len(case.sizes)]
    generator = torch.Generator().manual_seed(1000 * (case.seed + 1) + index)
    x = _randn(size, INPUTS, generator=generator)
    weights = torch.ones(size, dtype=torch.float64)
    if case.weights is not None:
        uniform = _rand(size, generator=generator)
        weights = uniform + 0.5 if case.weights == "smooth" else (uniform > 0.3).double()
    labels, kept = {}, {}
    for name, head in case.heads.items():  # those of absent tasks too: no other draw depends on it
        labels[name] = _labels(head, size, case.soft, generator)
        shape = (size,) if head.kind == "multiclass" else (size, head.outputs)
        kept[name] = _rand(*shape, generator=generator) >= case.missing
        kept[name][index % size] = True  # no task is without any label
    present = [name for name in case.heads if name not in case.absent.get(step, ())]

    def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name in present:
            kind, z = case.heads[name].kind, _as_rows(outputs[name], case.layout)
            each = _each(kind, z[kept[name]], labels[name][kept[name]])
            # An entry of the mask is an output of a datum, or a datum of a multi-class head.
            each = each * weights[kept[name].nonzero()[:, 0]]
            total = each.mean() if case.reduction == "mean" else each.sum()
            found[name] = total * case.factors.get(name, 1.0)
        return found

    targets = {
        name: _shaped(_with_holes(labels[name], kept[name]), case.layout) for name in present
    }
    return _shaped(x, case.layout), losses, targets


def _labels(head: HeadCase, size: int, soft: bool, generator: torch.Generator) -> Tensor:
    if head.kind == "multiclass" and not soft:
        return torch.randint(head.outputs, (size,), generator=generator)
    y = _randn(size, head.outputs, generator=generator)
    if head.kind == "regression":
        return y
    if head.kind == "binary":
        return torch.sigmoid(2 * y) if soft else (y > 0).double()
    return torch.softmax(2 * y, dim=1)


def _each(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """Losses one by one."""
    if kind == "regression":
        return F.mse_loss(outputs, labels, reduction="none")
    if kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    return F.cross_entropy(outputs, labels, reduction="none")


def _with_holes(labels: Tensor, kept: Tensor) -> Tensor:
    """Missing labels marked as :meth:`BayesAggWrapper.step` has it."""
    missing = ~kept if kept.dim() == labels.dim() else ~kept[:, None]
    return labels.masked_fill(missing, torch.nan if labels.is_floating_point() else -100)


def _shaped(rows: Tensor, layout: str) -> Tensor:
    """Rows ``[N]`` or ``[N, c]`` in the layout of a case."""
    if layout == "rows":
        return rows
    shape = (2, len(rows) // 2) if layout == "tokens" else (2, 2, len(rows) // 4)
    shaped = rows.view(*shape, *rows.shape[1:])
    return shaped.movedim(-1, 1) if layout == "maps" and rows.dim() > 1 else shaped


def _as_rows(tensor: Tensor, layout: str) -> Tensor:
    """Inverse of :func:`_shaped`, ``[N, c]``."""
    tensor = tensor.movedim(1, -1) if layout == "maps" else tensor
    return tensor.reshape(-1, tensor.shape[-1])


def _columns(head: nn.Module) -> list[Tensor]:
    """Weight and bias, ``[o, …]`` each."""
    return [p if p.dim() > 1 else p[:, None] for p in head.parameters()]


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rand(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)

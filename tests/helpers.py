"""Small multi-task models, their data, and exact snapshots of everything a step may change."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg import (
    BayesAgg,
    BayesAggWrapper,
    BinaryHead,
    LikelihoodRule,
    MulticlassHead,
    PaperRule,
    RegressionHead,
)
from bayesagg.heads import Head
from bayesagg.rules import Rule

INPUTS, WIDTH = 5, 4
HEADS = {"reg": RegressionHead, "bin": BinaryHead, "cls": MulticlassHead}
OUTPUTS = {"reg": 2, "bin": 2, "cls": 3}
PAPER_HEADS: dict[str, dict[str, Any]] = {"reg": {"s": 0.85, "noise_variance": 1.0}}
PaperBayesAgg = functools.partial(BayesAgg, rule="paper")

# Every behaviour is tested under both: see the fixture `rule`. Either adds losses up for three
# steps, which under the paper's rule are an epoch, and then is at work.
EPOCH = 3
RULES: dict[str, Rule] = {
    "likelihood": LikelihoodRule(memory=60, warmup=EPOCH, lag=5),
    "paper": PaperRule(),
}

PHASES = pytest.mark.parametrize("steps", [1, EPOCH + 1], ids=["pretraining", "after"])

SAMPLES = {"moments": "monte_carlo", "num_samples": 16}
QUICK = {"cls": SAMPLES}  # cubature over three classes is most of the time of a small step
SAMPLED = {"bin": SAMPLES, "cls": SAMPLES}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}


class Net(nn.Module):
    """A trunk and one linear head per task; also a buffer, by batch normalisation."""

    def __init__(
        self,
        outputs: Mapping[str, int] = OUTPUTS,
        *,
        inputs: int = INPUTS,
        width: int = WIDTH,
        trunk: Callable[[], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.trunk = (
            nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Tanh())
            if trunk is None
            else trunk()  # made here, under the seed of `make_net`
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, o, bias) for name, o in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def make_net(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> Net:
    """A network whose parameters depend on ``seed`` alone; the global generator is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**kwargs).to(device=device, dtype=dtype)


def plain_trunk(inputs: int = INPUTS, width: int = WIDTH) -> nn.Module:
    """One in which every datum is by itself: no batch normalisation."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh())


def plain_net(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    towers: bool = False,
    **kwargs: Any,
) -> Net:
    """As :func:`make_net`, with :func:`plain_trunk`; ``towers``: a hidden layer in every head."""
    net = make_net(device, dtype, trunk=plain_trunk, **kwargs)
    if towers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            for name, head in net.heads.items():
                tower = nn.Sequential(nn.Linear(WIDTH, head.in_features), nn.Tanh(), head)
                net.heads[name] = tower.to(device, dtype)
    return net


def rule_of(rule: str | Rule) -> Rule:
    """One of :data:`RULES` by name, or a rule itself."""
    return RULES[rule] if isinstance(rule, str) and rule in RULES else rule


def make_heads(
    net: nn.Module, rule: str | Rule = "paper", **settings: Mapping[str, Any]
) -> dict[str, Head]:
    """Head descriptions for a :class:`Net`; settings per task, as ``reg={"s": 1.0}``.

    Under the paper's rule regressions have its settings, with which every part of it has something
    to do. What the default rule has no use for, and would warn of, is left out under it.
    """
    if isinstance(rule_of(rule), PaperRule):
        own = {name: {**PAPER_HEADS.get(name, {}), **settings.get(name, {})} for name in net.heads}
    else:
        own = {n: dict(settings.get(n, {})) for n in net.heads}
        for given in own.values():
            for unused in ("s", "moments", "num_samples"):
                given.pop(unused, None)
    return {name: HEADS[name](m, **own[name]) for name, m in net.heads.items()}


def make_batch(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    size: int = 6,
    inputs: int = INPUTS,
    outputs: Mapping[str, int] = OUTPUTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs and labels; drawn on the CPU, so that every device sees the same data."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    labels: dict[str, Tensor] = {}
    for name, o in outputs.items():
        if name == "cls":
            labels[name] = torch.randint(o, (size,), generator=generator).to(device)
        else:
            y = torch.randn(size, o, generator=generator, dtype=torch.float64)
            labels[name] = (y if name == "reg" else (y > 0)).to(device=device, dtype=dtype)
    return x.to(device=device, dtype=dtype), labels


LOSSES = {
    "reg": F.mse_loss,
    "bin": F.binary_cross_entropy_with_logits,
    "cls": F.cross_entropy,
}


def make_losses(
    out: Mapping[str, Tensor], labels: Mapping[str, Tensor], reduction: str = "mean"
) -> dict[str, Tensor]:
    """The loss of every output, by task."""
    return {name: LOSSES[name](out[name], labels[name], reduction=reduction) for name in out}


def masked_losses(
    out: Mapping[str, Tensor], labels: Mapping[str, Tensor], present: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The mean over the data with a label, divided as for the whole batch."""
    losses = {}
    for name, z in out.items():
        known = labels[name].nan_to_num()
        each = LOSSES[name](z, known, reduction="none")
        losses[name] = each[present[name]].sum() / present[name].numel()
    return losses


def arguments_of(
    net: nn.Module,
    rule: str | Rule = "paper",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Those of an engine for a network; keywords that are settings of the rule go there."""
    rule = rule_of(rule)
    if dataclasses.is_dataclass(rule):
        own = {f.name for f in dataclasses.fields(rule)} & kwargs.keys()
        rule = dataclasses.replace(rule, **{name: kwargs.pop(name) for name in own})
    if "heads" not in kwargs:
        kwargs["heads"] = make_heads(net, rule, **(settings or {}))
    if isinstance(rule, PaperRule):
        kwargs.setdefault("steps_per_epoch", EPOCH)
    if "shared_rep_hook" not in kwargs:
        kwargs["shared_rep_hook"] = net.trunk
    return {"rule": rule, **kwargs}


def make_engine(net: nn.Module, rule: str | Rule = "paper", **kwargs: Any) -> BayesAgg:
    """The engine of a network; arguments as of :func:`arguments_of`."""
    return BayesAgg(**arguments_of(net, rule, **kwargs))


def wrap(
    net: nn.Module,
    base: str | torch.optim.Optimizer = "adam",
    rule: str | Rule = "paper",
    **kwargs: Any,
) -> BayesAggWrapper:
    """The network's parameters under a wrapped optimizer; arguments as of :func:`arguments_of`."""
    if isinstance(base, str):
        base = OPTIMIZERS[base](net.parameters())
    return BayesAggWrapper(base, **arguments_of(net, rule, **kwargs))


def train_step(
    net: nn.Module, optimizer: BayesAggWrapper, index: int, *, closure: bool = False, **batch: Any
) -> None:
    """Step number ``index``: its data depend on the number alone."""
    like = next(net.parameters())
    x, labels = make_batch(like.device, like.dtype, seed=index, **batch)
    if closure:

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            return optimizer.backward(make_losses(net(x), labels))

        optimizer.step(evaluate)
        return
    optimizer.zero_grad()
    optimizer.step(make_losses(net(x), labels))


def train(
    net: nn.Module, optimizer: BayesAggWrapper, steps: Iterable[int] | int, **kwargs: Any
) -> None:
    """Several steps; an integer counts from zero."""
    for index in range(steps) if isinstance(steps, int) else steps:
        train_step(net, optimizer, index, **kwargs)


def _frozen(value: Any) -> Any:
    """A copy that later in-place changes do not reach; plain objects become dictionaries."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _frozen(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_frozen(part) for part in value]
    return copy.copy(value)


def snapshot(
    model: nn.Module, optimizer: BayesAgg | BayesAggWrapper | torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Parameters, gradients, buffers, modes, optimizer state and engine state, copied."""
    found: dict[str, Any] = {
        "parameters": {name: p for name, p in model.named_parameters()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
        "training": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: len(m._forward_hooks) for name, m in model.named_modules()},
    }
    if isinstance(optimizer, BayesAgg):
        found["engine"] = optimizer.get_extra_state()
    elif optimizer is not None:  # the state of a wrapper has that of its engine
        found["optimizer"] = optimizer.state_dict()
        found["defaults"] = dict(optimizer.defaults)
    return _frozen(found)


def difference(before: Any, after: Any, path: str = "") -> str | None:
    """Where two snapshots first differ in a single bit, or ``None``."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            return f"{path}: {before.dtype} {before.shape} became {after.dtype} {after.shape}"
        same = (before == after) | ((before != before) & (after != after))
        if bool(same.all()):
            return None
        return f"{path}: {(~same).sum()} entries differ, e.g. {before[~same][0]} {after[~same][0]}"
    if isinstance(before, dict) and isinstance(after, dict):
        if list(before) != list(after):
            return f"{path}: keys {list(before)} became {list(after)}"
        parts = ((before[key], after[key], f"{path}/{key}") for key in before)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return f"{path}: length {len(before)} became {len(after)}"
        parts = ((b, a, f"{path}/{i}") for i, (b, a) in enumerate(zip(before, after, strict=True)))
    else:
        same = type(before) is type(after) and (before == after or before != before)
        return None if same else f"{path}: {before!r} became {after!r}"
    return next((found for part in parts if (found := difference(*part)) is not None), None)


def assert_same(before: Any, after: Any, *, ignore: Iterable[str] = ()) -> None:
    """Fail, naming the place, unless two snapshots agree in every bit."""
    ignore = set(ignore)
    kept = [{k: v for k, v in part.items() if k not in ignore} for part in (before, after)]
    found = difference(*kept)
    assert found is None, found


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all gradients, by parameter name."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def rounding(dtype: torch.dtype) -> dict[str, float]:
    """Tolerances of float64 sums over what a network computed in ``dtype``."""
    return {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}


def assert_finite(value: Any) -> None:
    """Fail if any tensor in nested containers has a NaN or an infinity."""
    for tensor in tensors_of(value):
        assert bool(torch.isfinite(tensor).all()), tensor


def skip_without_losses(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Skip the test where this PyTorch has no squared or absolute errors in a precision."""
    out = torch.ones(2, dtype=dtype, device=device, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are slow
            loss = F.mse_loss(out, out.detach())
            (loss + F.smooth_l1_loss(out, out.detach())).backward()
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        pytest.skip(str(error))

"""Heads, engines and wrappers of a network, and steps with them."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg import BayesAgg, BayesAggWrapper, PaperRule
from bayesagg.heads import Head
from bayesagg.rules import Rule
from tests.helpers.data import make_batch, make_losses
from tests.helpers.settings import EPOCH, HEADS, OPTIMIZERS, PAPER_HEADS, RULES
from tests.helpers.states import snapshot


def rule_of(rule: str | Rule) -> Rule:
    """One of :data:`RULES` by name, or a rule itself."""
    return RULES[rule] if isinstance(rule, str) and rule in RULES else rule


def make_heads(
    net: nn.Module, rule: str | Rule = "likelihood", **settings: Mapping[str, Any]
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


def arguments_of(
    net: nn.Module,
    rule: str | Rule = "likelihood",
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


def make_engine(net: nn.Module, rule: str | Rule = "likelihood", **kwargs: Any) -> BayesAgg:
    """The engine of a network; arguments as of :func:`arguments_of`."""
    return BayesAgg(**arguments_of(net, rule, **kwargs))


def wrap(
    net: nn.Module,
    base: str | torch.optim.Optimizer = "adam",
    rule: str | Rule = "likelihood",
    **kwargs: Any,
) -> BayesAggWrapper:
    """The network's parameters under a wrapped optimizer; arguments as of :func:`arguments_of`."""
    if isinstance(base, str):
        base = OPTIMIZERS[base](net.parameters())
    return BayesAggWrapper(base, **arguments_of(net, rule, **kwargs))


def train_step(
    net: nn.Module,
    optimizer: BayesAggWrapper,
    batch: int | tuple[Tensor, Mapping[str, Tensor]],
    *,
    forward: Callable[[Any, Tensor], dict[str, Tensor]] | None = None,
    step: Callable[[Any, dict[str, Tensor], Mapping[str, Tensor]], Any] | None = None,
    tasks: Collection[str] | None = None,
    closure: bool = False,
) -> None:
    """One step; a number stands for a batch whose data depend on it alone.

    ``forward(net, x)`` instead of the network's own, ``step(optimizer, losses, labels)`` instead of
    ``optimizer.step(losses)``; ``tasks``: which of them have losses, or all.
    """
    if isinstance(batch, int):
        like = next(net.parameters())
        batch = make_batch(like.device, like.dtype, seed=batch)
    x, labels = batch

    def losses() -> dict[str, Tensor]:
        out = net(x) if forward is None else forward(net, x)
        return make_losses({n: z for n, z in out.items() if tasks is None or n in tasks}, labels)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        return optimizer.backward(losses())

    if closure:
        optimizer.step(evaluate)
        return
    optimizer.zero_grad()
    if step is None:
        optimizer.step(losses())
    else:
        step(optimizer, losses(), labels)


def train(
    net: nn.Module, optimizer: BayesAggWrapper, steps: Iterable[int] | int, **kwargs: Any
) -> None:
    """Several steps; an integer counts from zero."""
    for index in range(steps) if isinstance(steps, int) else steps:
        train_step(net, optimizer, index, **kwargs)


def run(
    net: nn.Module,
    rule: str | Rule,
    base: str | torch.optim.Optimizer = "adam",
    steps: Iterable[int] | int = 7,
    **kwargs: Any,
) -> dict[str, Any]:
    """The :func:`snapshot` of a network at its end; arguments of a step, others of :func:`wrap`."""
    how = {name: kwargs.pop(name) for name in ("forward", "step", "tasks") if name in kwargs}
    optimizer = wrap(net, base, rule, **kwargs)
    train(net, optimizer, steps, **how)
    return snapshot(net, optimizer)

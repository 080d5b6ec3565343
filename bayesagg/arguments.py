"""What the engine is given: rules by name, and errors that say what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from bayesagg.heads import Head, LossTask
from bayesagg.rules import LikelihoodRule, PaperRule, Rule

__all__ = [
    "check_arguments",
    "check_step",
    "device_of",
    "passthrough_of",
    "rule_of",
    "warn_of_optimizer",
]

_RULES: dict[str, Callable[[], Rule]] = {"likelihood": LikelihoodRule, "paper": PaperRule}


def rule_of(rule: str | Rule) -> Rule:
    """A rule by its name, or as it is; a ValueError for what is neither."""
    if isinstance(rule, str):
        if rule not in _RULES:
            raise ValueError(
                f"rule must be one of {', '.join(map(repr, _RULES))}, or an object such as "
                f"bayesagg.rules.LikelihoodRule(), got {rule!r}."
            )
        return _RULES[rule]()
    if isinstance(rule, type) or not hasattr(rule, "plan"):
        raise ValueError(
            f"rule must be a name or a rule object, such as bayesagg.LikelihoodRule() with its "
            f"brackets, got {rule!r}."
        )
    found: Rule = rule
    return found


def check_arguments(
    shared_rep_hook: nn.Module | None, dtype: torch.dtype, steps: int | None
) -> None:
    """Those that are used as they are: a ValueError for another type, or one out of range."""
    if shared_rep_hook is not None and not isinstance(shared_rep_hook, nn.Module):
        raise ValueError(
            f"`shared_rep_hook` must be the last shared nn.Module, or None, got "
            f"{type(shared_rep_hook).__name__}. Pass the module itself, not its output."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}.")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(
            f"steps_per_epoch must be a positive integer, such as len(train_loader), or None; got "
            f"{steps!r}."
        )


def check_step(
    optimizer: Optimizer, losses: Any, targets: Any, closure: Callable[[], Any] | None
) -> None:
    """What a step is called with fits together, and the optimizer.

    Raises:
        TypeError: for losses and a closure at once, targets without losses, or losses where the
            optimizer needs a closure.
    """
    if callable(losses) and closure is not None:
        raise TypeError("step() got two closures: pass one, and losses inside of it.")
    if losses is not None and closure is not None:
        raise TypeError("step() takes losses or a closure, not both.")
    if (losses is None or callable(losses)) and targets is not None:
        raise TypeError("step() got targets without losses: pass both, or neither.")
    if closure is None and not callable(losses) and isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS evaluates the model several times a step: pass a closure that calls "
            "`optimizer.zero_grad()`, computes the losses and returns "
            "`optimizer.backward(losses)`, as in `optimizer.step(closure)`."
        )


def warn_of_optimizer(optimizer: Optimizer, heads: Mapping[str, Head], rule: Rule) -> None:
    """Heads that the optimizer lacks, or that a posterior sets while it has to know of all moves.

    The former would stay as they are in the warm-up. LBFGS takes differences of gradients for the
    curvature: with a head that moves of itself they may be anything, and so may the step be.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, head in heads.items():
        if any(p.requires_grad and id(p) not in owned for p in head.parameters()):
            warnings.warn(
                f"task {name!r}: the optimizer does not have the parameters of its head. Pass it "
                f"all parameters of the model, or freeze the head (requires_grad_(False)). Where "
                f"several optimizers share the model, use the engine, bayesagg.BayesAgg, instead.",
                stacklevel=3,
            )
    moved = [name for name, head in heads.items() if head.writable and rule.sets(head)]
    if moved and isinstance(optimizer, LBFGS):
        warnings.warn(
            f"task {moved[0]!r}: the posterior sets its head, which LBFGS would have to move "
            f"itself: training may diverge. Give it readout='gradient', and all others like it.",
            stacklevel=3,
        )


def device_of(
    tasks: Mapping[str, Head | LossTask],
    losses: object = None,
    dtype: torch.dtype = torch.float32,
) -> torch.device:
    """Where the first head is; where there is none, the first loss; else the CPU.

    Raises:
        ValueError: where that device has no tensors of the dtype.
    """
    given = losses.values() if isinstance(losses, Mapping) else losses
    heads = (task.linear.weight for task in tasks.values() if isinstance(task, Head))
    some = chain(heads, given if isinstance(given, Iterable) else ())
    device = next((one.device for one in some if isinstance(one, Tensor)), torch.device("cpu"))
    if device.type == "mps" and dtype == torch.float64:
        raise ValueError("Apple's MPS has no double precision: pass dtype=torch.float32.")
    return device


def passthrough_of(names: Collection[str], tasks: Mapping[str, Head | LossTask]) -> frozenset[str]:
    """Names of losses whose gradients arrive as they are; a ValueError for those of tasks."""
    if isinstance(names, str):
        raise ValueError(f"passthrough must be a collection of names, as in ({names!r},).")
    found = frozenset(names)
    both = sorted(found & tasks.keys())
    if both:
        raise ValueError(
            f"passthrough names {both[0]!r}, which is also an entry of `heads`: name it in one of "
            f"the two."
        )
    return found

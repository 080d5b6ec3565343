"""The optimizer that takes the steps: which it is, and whether the gradient's scale has a say."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["alike", "on_step", "step_is_invariant", "warn_of_modes"]

_Owner = TypeVar("_Owner")

_PARAMETER, _GRADIENT, _SCALE = 0.05, 1e-3, 16.0  # of the order of those of networks
_TOLERANCE = 0.05


def alike(optimizer: Optimizer, parameter: torch.nn.Parameter, group: int = 0) -> Optimizer:
    """An optimizer of the same kind and settings, those of a group, for one parameter."""
    known = inspect.signature(type(optimizer).__init__).parameters
    own = optimizer.param_groups[group]
    settings = {k: v for k, v in {**optimizer.defaults, **own}.items() if k in known}
    settings.pop("params", None)
    if "lr" in settings:
        settings["lr"] = 1e-3  # a schedule may start at 0
    return type(optimizer)([parameter], **settings)


@torch.no_grad()
def step_is_invariant(optimizer: Optimizer) -> bool:
    """Ask an optimizer like this, and its first group, to take a few steps with either scale.

    Adam and its relatives, Adagrad, RMSprop and Lion move as far for a gradient 16 times as long,
    SGD does not, and neither does Adam with a weight decay that is part of the gradient and not
    small beside it. Optimizers that cannot be made anew, or need a closure, count as dependent;
    in place of one that has another inside (Lookahead, ZeroRedundancyOptimizer) that is asked.
    """
    moves = []
    for scale in (1.0, _SCALE):
        parameter = torch.nn.Parameter(torch.full((2, 2), _PARAMETER, dtype=torch.float64))
        try:
            copy = alike(optimizer, parameter)
            getattr(copy, "train", bool)()  # schedule-free ones take no step before
            for step in range(5):
                # Of either sign: a weight decay of the gradient's sign would not show.
                shape = torch.linspace(-1.0, 1.0 + 0.3 * step, 4, dtype=torch.float64)
                parameter.grad = (scale * _GRADIENT * shape * (-1) ** step).view(2, 2)
                copy.step()
        except Exception:  # of whatever library: it cannot be asked
            inner = next((v for v in vars(optimizer).values() if isinstance(v, Optimizer)), None)
            return inner is not None and step_is_invariant(inner)
        moves.append(parameter.detach() - _PARAMETER)
    small, large = moves
    return bool(small.any()) and bool(((large - small).norm() <= _TOLERANCE * small.norm()).item())


def on_step(
    owner: _Owner,
    parameters: Iterable[torch.nn.Parameter],
    wanted: Callable[[_Owner], bool],
    found: Callable[[_Owner, Optimizer], None],
) -> None:
    """Call ``found`` after a step of any optimizer that has some of the parameters.

    Args:
        owner: whom it is for; it is not kept alive, and the hook goes with it.
        parameters: of a network.
        wanted: whether the owner still wants to know.
        found: called with the owner and the optimizer.
    """
    alive, mine = weakref.ref(owner), {id(p) for p in parameters}

    def stepped(optimizer: Optimizer, *_: object) -> None:
        this = alive()
        if this is None or not wanted(this):
            return
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            found(this, optimizer)

    handle = register_optimizer_step_post_hook(stepped)
    weakref.finalize(owner, handle.remove)


def warn_of_modes(optimizer: Optimizer) -> None:
    """Say what an optimizer that nobody wrapped would do to the heads (schedule-free ones do)."""
    if callable(getattr(optimizer, "eval", None)):
        warnings.warn(
            f"{type(optimizer).__name__} has other weights for evaluation, and takes heads away "
            f"from their posterior means: pass it to BayesAggWrapper, and call train() and eval() "
            f"of that.",
            stacklevel=5,
        )

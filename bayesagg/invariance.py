"""Whether an optimizer's step depends on the scale of the gradient."""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer

__all__ = ["alike", "step_is_invariant"]

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
    """Ask an optimizer of the same kind and settings to take a few steps with either scale.

    Adam and its relatives, Adagrad, RMSprop and Lion move as far for a gradient 16 times as long,
    SGD does not, and neither does Adam with a weight decay that is part of the gradient and not
    small beside it. Optimizers that cannot be made anew, or need a closure, count as dependent.

    Args:
        optimizer: its first group's settings count.
    """
    moves = []
    for scale in (1.0, _SCALE):
        parameter = torch.nn.Parameter(torch.full((2, 2), _PARAMETER, dtype=torch.float64))
        try:
            copy = alike(optimizer, parameter)
            for step in range(5):
                # Of either sign: a weight decay of the gradient's sign would not show.
                shape = torch.linspace(-1.0, 1.0 + 0.3 * step, 4, dtype=torch.float64)
                parameter.grad = (scale * _GRADIENT * shape * (-1) ** step).view(2, 2)
                copy.step()
        except Exception:  # of whatever library: it cannot be asked
            return False
        moves.append(parameter.detach() - _PARAMETER)
    small, large = moves
    return bool(small.any()) and bool(((large - small).norm() <= _TOLERANCE * small.norm()).item())

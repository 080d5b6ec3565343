"""The engine's state in a checkpoint: what it was saved from, and whether it fits."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bayesagg.arguments import device_of
from bayesagg.checking import check, check_keys, scalar_leaf, tensor_leaf
from bayesagg.errors import CheckpointError
from bayesagg.heads import Head, LossTask
from bayesagg.invariance import alike
from bayesagg.reading import Reader
from bayesagg.rules.base import Memory

__all__ = ["PosteriorState", "describe", "load_optimizer", "read_state"]

_LARGEST = 1 << 22  # parameters with states that an optimizer is asked for
_KEYS = ("rule", "heads", "memory", "reader", "optimizer_known", "task_weights")


def describe(tasks: Mapping[str, Head | LossTask]) -> list[list[str]]:
    """Name and kind of every task, in their order; only the same tasks can load a state."""
    return [[name, _form(head)] for name, head in tasks.items()]


def _form(head: Head | LossTask) -> str:
    if isinstance(head, LossTask):
        return "loss"
    bias = "" if head.has_bias else ", no bias"
    return f"{head.kind} {head.in_features} -> {head.out_features}{bias}"


def _listed(heads: list[Any]) -> str:
    return "; ".join(str(head).strip("[]") for head in heads)


def read_state(
    state: Any, tasks: Mapping[str, Head | LossTask], rule: str, memory: Memory, reader: Reader
) -> dict[str, Any]:
    """The state of a checkpoint in the form in which an engine can install it.

    Memory and reader are those of the engine, which say what fits.

    Raises:
        CheckpointError: if the state was saved from other heads or under another rule, or a part
            of it is missing or damaged; nothing has changed then.
    """
    own = describe(tasks)
    if isinstance(state, dict) and isinstance(state.get("heads"), list) and state["heads"] != own:
        raise CheckpointError(
            f"the checkpoint was saved from other heads ({_listed(state['heads'])}) than there "
            f"are here ({_listed(own)}). Build with the same heads, in the same order."
        )
    check_keys(state, _KEYS, "the state of bayesagg")
    check(state["heads"] == own, "the description of the heads is damaged")
    if state["rule"] != rule:
        raise CheckpointError(
            f"the checkpoint was saved under rule {state['rule']!r}, here it is {rule!r}. Build "
            f"the wrapper or engine with the rule it was saved with."
        )
    device, shares = device_of(tasks), {}
    check_keys(state["task_weights"], tasks.keys(), "the dictionary of task weights")
    for name, value in state["task_weights"].items():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        like = (value if floating else torch.zeros(())).to(device)
        what = f"task {name!r}: its weight"
        shares[name] = tensor_leaf(value, (tasks[name].num_tasks,), like, what, minimum=0.0)
    return {
        "memory": memory.loaded(state["memory"], device),
        "reader": reader.loaded(state["reader"]),
        "optimizer_known": scalar_leaf(state["optimizer_known"], bool, "the mark of the optimizer"),
        "task_weights": shares,
    }


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of a plain optimizer, all of it or nothing (a :class:`CheckpointError`)."""
    _check_optimizer(optimizer, state)
    try:
        optimizer.load_state_dict(state)
    except Exception as error:  # of whatever optimizer
        raise CheckpointError(
            f"the checkpoint's state of {type(optimizer).__name__} cannot be loaded ({error}). "
            f"Build the same optimizer over the same parameters."
        ) from error


def _check_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What every ``torch.optim`` optimizer's state has in common, checked leaf by leaf."""
    own = optimizer.state_dict()
    what = f"the state of {type(optimizer).__name__}"
    check(own.keys() <= state.keys(), f"{what} is incomplete")
    check(isinstance(state["state"], dict), f"{what} has no dict of states")
    groups = state["param_groups"]
    check(
        isinstance(groups, list) and len(groups) == len(own["param_groups"]),
        f"{what} has other parameter groups",
    )
    owners: dict[Any, tuple[int, torch.Tensor]] = {}
    pairs = zip(own["param_groups"], groups, optimizer.param_groups, strict=True)
    for number, (mine, group, real) in enumerate(pairs):
        # Schedulers add settings of their own, and there may be one now, or none any more.
        needed = {"params", *mine.keys() & getattr(optimizer, "defaults", {}).keys()}
        check(
            isinstance(group, dict) and needed <= group.keys(),
            f"{what} has a parameter group that is incomplete",
        )
        params = group["params"]
        check(
            isinstance(params, list)
            and all(type(index) is int for index in params)
            and params == mine["params"],
            f"{what} has a group with other parameters",
        )
        some = ((number, parameter) for parameter in real["params"])
        owners.update(zip(mine["params"], some, strict=True))
        for key, value in mine.items():
            if key != "params" and key in group:
                _check_like(group[key], value, f"{what}: {key}")
    _check_states(optimizer, state["state"], owners, what)


def _check_states(
    optimizer: Optimizer,
    states: Mapping[Any, Any],
    owners: Mapping[Any, tuple[int, torch.Tensor]],
    what: str,
) -> None:
    """States of parameters; ``owners``: number of the group and parameter of every index."""
    templates: dict[Any, dict[str, Any]] = {}
    for index, entries in states.items():
        check(index in owners and isinstance(entries, dict), f"{what} has a state of no parameter")
        number, parameter = owners[index]
        key = number, tuple(parameter.shape)
        if key not in templates:
            templates[key] = _template(optimizer, *key)
        template, owner = templates[key], f"of parameter {index}"
        check(template.keys() <= entries.keys(), f"{what} {owner} is incomplete")
        for name, value in entries.items():
            _check_leaf(value, template.get(name), f"{what}: {name} {owner}", bool(key[1]))


def _template(optimizer: Optimizer, group: int, shape: Sequence[int]) -> dict[str, Any]:
    """What one step leaves for a parameter of this shape; nothing, where it cannot be asked.

    The shape matters: some optimizers (Adafactor, Muon) treat matrices by rows and columns.
    """
    if math.prod(shape) > _LARGEST:
        return {}
    parameter = torch.nn.Parameter(torch.ones(shape, device="cpu"))
    try:
        copy = alike(optimizer, parameter, group)
        parameter.grad = torch.ones_like(parameter)
        copy.step()
    except Exception:  # of whatever library
        return {}
    return dict(copy.state[parameter])


def _check_like(value: Any, mine: Any, what: str) -> None:
    """A setting of the same kind as the optimizer's own."""
    if mine is None:
        check(value is None or isinstance(value, bool), f"{what} is {value!r}")
    elif isinstance(mine, bool):
        check(isinstance(value, bool), f"{what} is {value!r}")
    elif isinstance(mine, int | float | torch.Tensor):
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        single = isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_complex()
        check((plain or single) and math.isfinite(float(value)), f"{what} is {value!r}")
        # Some settings are exponents, and negative, as Adafactor's beta2_decay.
        check(float(value) >= 0 or float(mine) < 0, f"{what} is {value!r}")
    elif isinstance(mine, tuple | list):
        same = isinstance(value, tuple | list) and len(value) == len(mine)
        check(same, f"{what} is {value!r}")
        for one, other in zip(value, mine, strict=True):
            _check_like(one, other, what)


def _check_leaf(value: Any, like: Any, what: str, wide: bool) -> None:
    """An entry of a parameter's state: of the kind that ``like`` is, and finite.

    ``wide``: the parameter is no scalar itself, so that a scalar is a count or a product.
    """
    if isinstance(value, torch.Tensor):
        check(bool(torch.isfinite(value).all()) and not value.is_complex(), f"{what} is damaged")
    if isinstance(like, torch.Tensor):
        check(isinstance(value, torch.Tensor), f"{what} is a {type(value).__name__}")
        check(value.shape == like.shape, f"{what} has shape {tuple(value.shape)}")
        check(value.is_floating_point() == like.is_floating_point(), f"{what} is {value.dtype}")
        positive = (like.dim() == 0 and wide) or any(
            part in what for part in (": step of", "_sq", "square", "sum")
        )
        check(not positive or bool((value >= 0).all()), f"{what} is negative")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        check(math.isfinite(value), f"{what} is {value!r}")
        check(isinstance(like, int | float | None) and value >= 0, f"{what} is {value!r}")
    elif like is not None:
        check(isinstance(value, type(like)), f"{what} is a {type(value).__name__}")


class PosteriorState:
    """The posterior for ``torch.distributed.checkpoint``, beside the model and the optimizer.

    Distributed checkpoints take an optimizer apart by parameter, and keep of it what belongs to
    parameters only. So the wrapped optimizer and the posterior are saved side by side::

        state = {
            "model": model_state,          # both of get_state_dict(model, optimizer.base_optimizer)
            "optimizer": optimizer_state,
            "bayesagg": PosteriorState(optimizer),
        }
        dcp.save(state, checkpoint_id=folder)

    The same dictionary is passed to ``dcp.load``, which hands the posterior to its owner. It is the
    same on every rank, and can be loaded by another number of them.

    Args:
        owner: the wrapper, or the engine where the optimizer is one's own.
    """

    def __init__(self, owner: Optimizer | nn.Module) -> None:
        self.engine = owner if isinstance(owner, nn.Module) else owner.engine  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """One value: a posterior that has not seen data has other entries than one that has."""
        file = io.BytesIO()
        torch.save(self.engine.get_extra_state(), file)
        return {"state": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: if the state was saved from other heads; the owner is unchanged then.
        """
        saved = state_dict.get("state") if isinstance(state_dict, dict) else None
        check(isinstance(saved, bytes), "it has no state of bayesagg")
        assert isinstance(saved, bytes)
        try:
            own = torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, zip or torch
            raise CheckpointError(
                f"the checkpoint's state of bayesagg is damaged ({error}). Load an older one."
            ) from error
        self.engine.set_extra_state(own)

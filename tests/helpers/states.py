"""Exact snapshots of everything a step may change, and how far two of them agree."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg import BayesAgg, BayesAggWrapper


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


def hooks_of(module: nn.Module) -> int:
    """The number of a module's hooks, of any kind."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks")
    return sum(len(getattr(module, f"_{kind}")) for kind in kinds)


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
        "hooks": {name: hooks_of(m) for name, m in model.named_modules()},
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


def assert_near(one: Any, other: Any, path: str = "", *, tolerance: float = 1e-9) -> None:
    """Nested states of the same form, tensors alike to rounding, all else exactly."""
    if isinstance(one, Tensor):
        torch.testing.assert_close(
            one, other, rtol=tolerance, atol=tolerance, msg=lambda said: f"{path}: {said}"
        )
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_near(value, other[key], f"{path}/{key}", tolerance=tolerance)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_near(a, b, f"{path}/{i}", tolerance=tolerance)
    else:
        assert one == other, (path, one, other)


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

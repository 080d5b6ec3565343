"""Tensors that are made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["kept"]

_MANY = 128  # values of one function

P = ParamSpec("P")
T = TypeVar("T")


def kept(make: Callable[P, T]) -> Callable[P, T]:
    """A function of tensors that is called once for its arguments, which are hashable.

    As ``functools.lru_cache``, but what it keeps can be used anywhere: nothing is kept of a graph
    that is traced, where tensors have no values, and nothing made for inference, where they have no
    gradients.
    """
    found: dict[Hashable, T] = {}

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        key = args, *kwargs.items()
        if key in found:
            return found[key]
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        if len(found) >= _MANY:
            found.clear()
        with torch.inference_mode(False):
            found[key] = make(*args, **kwargs)
        return found[key]

    get.cache_clear = found.clear  # type: ignore[attr-defined]
    return get

"""Forward hooks that note what every head reads and says, and taps that carry planned gradients.

Between a head and what it reads lies a *tap*: an identity whose backward pass hands on the gradient
that was planned for the head's features, in place of the head's own. Whatever else depends on these
features sends its gradient past the tap, unchanged.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesagg.errors import CaptureError, FeatureError
from bayesagg.heads import Head
from bayesagg.layers import check_call
from bayesagg.parallel import ProcessGroup, running_group

__all__ = ["Call", "Capture", "Slot", "flatten", "unflatten"]

_MANY = 1000  # calls of a head that no loss has asked for; more are forgotten
_BREAK = (
    "bayesagg notes what heads read and say in forward hooks, which cannot be part of a graph. "
    "Compile the shared network and each head apart, as in model.backbone = "
    "torch.compile(model.backbone), before the optimizer is wrapped; or leave out fullgraph=True."
)


def flatten(tensor: Tensor, channels_first: bool) -> Tensor:
    """Every position a datum: ``[B, c, ...]`` or ``[..., c]`` to ``[N, c]``."""
    if channels_first:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


def unflatten(rows: Tensor, like: Tensor, channels_first: bool) -> Tensor:
    """Inverse of :func:`flatten`, in the shape and layout of ``like``."""
    if not channels_first:
        return rows if rows.shape == like.shape else rows.reshape(like.shape)
    moved = (like.shape[0], *like.shape[2:], like.shape[1])
    # In the layout of `like`: other strides slow the whole backward pass down.
    return torch.empty_like(like, dtype=rows.dtype).copy_(rows.reshape(moved).movedim(-1, 1))


@dataclass
class Slot:
    """What the backward pass finds at a tap; lives as long as the graph.

    Attributes:
        planned: whether the head's own gradient is replaced.
        gradient: by what, in the shape of the features; ``None``: by nothing, because another
            head that reads the same tensor carries the gradient of both.
        factor: incoming gradient of the scalar whose backward pass runs; ``None``: one.
        used: a backward pass came by without a plan.
    """

    planned: bool = False
    gradient: Tensor | None = None
    factor: Tensor | None = None
    used: bool = False


class _Tap(torch.autograd.Function):
    """Identity with a gradient of its own, where one is planned."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, slot: Slot) -> Tensor:
        ctx.slot = slot
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        slot: Slot = ctx.slot
        if not slot.planned:
            slot.used = True
            return gradient, None
        if slot.gradient is None:
            return None, None
        planned = slot.gradient
        if slot.factor is not None:
            # In the precision of the plan: a factor may save half precision from underflow.
            planned = planned * slot.factor.to(planned.dtype)
        return planned.to(gradient.dtype), None


@dataclass
class Call:
    """One call of a head in training mode.

    Attributes:
        features: what the head received, before the tap, with its graph.
        output: what it returned.
        slot: of the tap; ``None`` where the features need no gradient.
        versions: of features and output when they were noted.
    """

    features: Tensor
    output: Tensor
    slot: Slot | None
    versions: tuple[int, int]


# Before torch 2.7 nothing tells an exporting dynamo from a compiling one.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


class _Hook:
    """A hook that does not keep its capture alive, and is inert in any copy of its module.

    A copied or unpickled model (an EMA average, a saved module) must not report to the engine of
    the original.
    """

    def __init__(self, capture: Capture, method: Callable[..., Any], name: str) -> None:
        self._capture: Callable[[], Capture | None] = weakref.ref(capture)
        self._method, self._name = method, name
        self._untraced = _untraced()

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """Tell the capture, if it still exists."""
        if torch.compiler.is_compiling():
            exporting = _is_exporting() or not torch.compiler.is_dynamo_compiling()
            if exporting or not module.training:
                return None  # nothing is noted, so that nothing has to break the graph
            return self._untraced(self, module, *args)
        capture = self._capture()
        return None if capture is None else self._method(capture, self._name, module, *args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return (_inert_hook, ())


@functools.cache
def _untraced() -> Callable[..., Any]:
    """Made when it is first used: it imports the whole compiler, as any optimizer does."""
    try:
        return cast("Callable[..., Any]", torch.compiler.disable(_Hook.__call__, reason=_BREAK))
    except TypeError:  # before torch 2.7 a break has no reason
        return cast("Callable[..., Any]", torch.compiler.disable(_Hook.__call__))


def _ignore(*_: Any) -> None:
    """What a hook becomes in a copy of its module."""


def _inert_hook() -> Callable[..., None]:
    return _ignore


@dataclass(eq=False)
class Capture:
    """Watches the heads of one model.

    Args:
        heads: by name.

    Attributes:
        calls: of every head since :meth:`clear`, in their order.
        group: ranks over which DistributedDataParallel averages the gradients of the last forward
            pass; ``None``: that pass was not made under it.
    """

    heads: Mapping[str, Head]
    calls: dict[str, list[Call]] = field(init=False)
    group: ProcessGroup | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.heads = dict(self.heads)
        self._start()

    def _start(self) -> None:
        self.group = None
        self._pending: dict[str, tuple[Tensor, Slot | None]] = {}  # calls that have not returned
        self.clear()
        handles = []
        for name, head in self.heads.items():
            module = head.watched
            _drop_inert(module)
            before, after = (_Hook(self, m, name) for m in (Capture._before, Capture._after))
            # First of all: FSDP2 hands an alias of the features to hooks that come later.
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def __getstate__(self) -> dict[str, Any]:
        return {"heads": self.heads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.heads = state["heads"]
        self._start()

    def clear(self) -> None:
        """Forget all forward passes."""
        self.calls = {name: [] for name in self.heads}

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the features and put a tap behind them."""
        self._pending.pop(name, None)
        if not (module.training and torch.is_grad_enabled()) or _in_between():
            return None
        check_call(module, name)
        key = "" if args else next(iter(kwargs), "")  # torch's say `input`, others `x`
        features = args[0] if args else kwargs.get(key)
        if not isinstance(features, Tensor):
            return None  # the module itself says what is wrong
        if not features.requires_grad:
            self._pending[name] = features, None
            return None
        slot = Slot()
        self._pending[name] = features, slot
        tapped = _Tap.apply(features, slot)
        return ((tapped, *args[1:]), kwargs) if args else (args, {**kwargs, key: tapped})

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        pending = self._pending.pop(name, None)
        if pending is None or not output.requires_grad:
            return
        self.group = running_group()
        calls = self.calls[name]
        if calls and calls[0].slot is not None and calls[0].slot.used:
            # The losses' own backward() was called: these passes will not be asked for again.
            calls[:] = [call for call in calls if call.slot is None or not call.slot.used]
        if len(calls) == _MANY:
            warnings.warn(
                f"head {name!r} was called {_MANY} times in training mode without a step: older "
                f"calls are forgotten. Evaluate under torch.no_grad() or in evaluation mode.",
                stacklevel=2,
            )
            del calls[: _MANY // 2]
        features, slot = pending
        calls.append(Call(features, output, slot, (features._version, output._version)))

    def check(self, names: list[str]) -> None:
        """What the heads ``names`` read and said in this step can be used.

        Raises:
            CaptureError: no forward pass of a head was seen.
        """
        for name in names:
            if not self.calls[name]:
                raise CaptureError(
                    f"task {name!r}: no forward pass of its head was seen. Run the model that was "
                    f"wrapped, in training mode and with gradients (inside of a checkpoint: "
                    f"use_reentrant=False), before each `backward` or `step(losses)`. A copy of it "
                    f"needs a copy of the optimizer, made with it (`copy.deepcopy((model, "
                    f"optimizer))`); a model whose head was replaced is to be wrapped anew. To "
                    f"train in evaluation mode, with frozen statistics, call train() of the heads "
                    f"alone. A model that ran under torch.compile before it was wrapped does not "
                    f"report: wrap first. Nor does a call inside of vmap or grad of torch.func."
                )

    def check_unchanged(self, name: str, calls: Sequence[Call]) -> None:
        """Neither what a head read in some calls nor what it said was modified since.

        Raises:
            FeatureError: if something was.
        """
        for call in calls:
            if call.features._version != call.versions[0]:
                raise FeatureError(
                    f"task {name!r}: what its head received was modified in place afterwards "
                    f"(an in-place activation?). Use the out-of-place version of that operation."
                )
            if call.output._version != call.versions[1]:
                raise FeatureError(
                    f"task {name!r}: the head's output was modified in place before the loss. "
                    f"Use the out-of-place version of that operation."
                )


def _drop_inert(module: nn.Module) -> None:
    """Take off hooks that came along with a copy of the module."""
    for hooks, options in (
        (module._forward_hooks, None),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            if hook is _ignore:
                del hooks[key]
                if options is not None:
                    options.pop(key, None)


def _in_between() -> bool:
    """Whether checkpointing runs a module again, or ``torch.func`` transforms it."""
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward or torch._C._are_functorch_transforms_active()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

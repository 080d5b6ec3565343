"""Forward hooks that note the shared representation and the output of every head."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesagg.distributed import ProcessGroup, running_group
from bayesagg.errors import CaptureError, FeatureError
from bayesagg.heads import Head

__all__ = ["Capture", "flatten", "unflatten"]

_numbers = itertools.count()  # of forward passes
_BREAK = (
    "bayesagg notes the shared representation and the heads' outputs in forward hooks, which "
    "cannot be part of a graph. Compile the shared network and each head apart, as in "
    "model.backbone = torch.compile(model.backbone), before the optimizer is wrapped; or leave "
    "out fullgraph=True."
)


def flatten(tensor: Tensor, channels_first: bool) -> Tensor:
    """Every position a datum: ``[B, c, ...]`` or ``[..., c]`` to ``[N, c]``."""
    if channels_first:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


def unflatten(rows: Tensor, like: Tensor, channels_first: bool) -> Tensor:
    """Inverse of :func:`flatten`, in the shape, dtype and device of ``like``."""
    rows = rows.to(like.dtype)
    if not channels_first:
        return rows.reshape(like.shape)
    moved = (like.shape[0], *like.shape[2:], like.shape[1])
    # In the layout of `like`: other strides slow the whole backward pass down.
    return torch.empty_like(like).copy_(rows.reshape(moved).movedim(-1, 1))


class _Hook:
    """A forward hook that does not keep its capture alive, and is inert in any copy.

    A copied or unpickled model (an EMA average, a saved module) must not report to the wrapper
    of the original.
    """

    def __init__(self, capture: Capture, method: str, argument: tuple[str, ...]) -> None:
        self._capture: Callable[[], Capture | None] = weakref.ref(capture)
        self._method, self._argument = method, argument
        self._untraced = _untraced()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._untraced(self, module, args, output)

    def report(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Tell the capture, if it still exists."""
        capture = self._capture()
        if capture is not None:
            getattr(capture, self._method)(*self._argument, module, args, output)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return (_inert_hook, ())


@functools.cache
def _untraced() -> Callable[..., None]:
    """Made when it is first used: it imports the whole compiler, as any optimizer does."""
    try:
        return cast("Callable[..., None]", torch.compiler.disable(_Hook.report, reason=_BREAK))
    except TypeError:  # before torch 2.7 a break has no reason
        return cast("Callable[..., None]", torch.compiler.disable(_Hook.report))


def _ignore(*_: Any) -> None:
    """What a hook becomes in a copy of its module."""


def _inert_hook() -> Callable[..., None]:
    return _ignore


class Capture:
    """Watches one model: ``h`` is what the heads receive, checked against the shared module.

    Args:
        shared_rep_hook: the last shared module, or ``None`` to take what the heads receive.
        heads: by name.

    Attributes:
        group: ranks over which DistributedDataParallel averages the gradients of the last forward
            pass; ``None``: that pass was not made under it.
    """

    def __init__(self, shared_rep_hook: nn.Module | None, heads: Mapping[str, Head]) -> None:
        if shared_rep_hook is not None and not isinstance(shared_rep_hook, nn.Module):
            raise CaptureError(
                f"`shared_rep_hook` must be the last shared nn.Module, or None, got "
                f"{type(shared_rep_hook).__name__}. Pass the module itself, not its output."
            )
        self.shared, self.heads = shared_rep_hook, dict(heads)
        self._reset()
        self._attach()

    @property
    def modules(self) -> list[nn.Module]:
        """The watched modules: the heads' linear layers, then the shared module."""
        modules: list[nn.Module] = [head.linear for head in self.heads.values()]
        return modules if self.shared is None else [*modules, self.shared]

    def _reset(self) -> None:
        self._shared_output: Callable[[], Tensor | None] | None = None
        self._shared_type = ""
        self.group: ProcessGroup | None = None
        self._key = f"bayesagg-{next(_numbers)}"  # of this capture's marks on graphs
        self._paused = False
        self.clear()

    def clear(self) -> None:
        """Forget all forward passes."""
        self._passes = 0
        self._forget()

    def _forget(self) -> None:
        """Forget the last forward pass."""
        self.h: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}
        self._h_version = 0
        self._versions: dict[str, int] = {}
        self._stray: str | None = None

    def _attach(self) -> None:
        handles = []
        for module in [head.module for head in self.heads.values()] + [self.shared]:
            if module is not None:  # hooks that came along with a copy of the module
                for key, hook in list(module._forward_hooks.items()):
                    if hook is _ignore:
                        del module._forward_hooks[key]
        if self.shared is not None:
            hook = _Hook(self, "_on_shared", ())
            handles.append(self.shared.register_forward_hook(hook))
        for name, head in self.heads.items():
            hook = _Hook(self, "_on_head", (name,))
            handles.append(head.module.register_forward_hook(hook))
        self._finalizer = weakref.finalize(self, _remove, handles)

    def __getstate__(self) -> dict[str, Any]:
        return {"shared": self.shared, "heads": self.heads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.shared, self.heads = state["shared"], state["heads"]
        self._reset()
        self._attach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a backward pass runs, modules that checkpointing runs again do not report."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _on_shared(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._paused:
            return
        is_tensor = isinstance(output, Tensor)
        self._shared_output = weakref.ref(output) if is_tensor else None
        self._shared_type = type(output).__name__

    def _on_head(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        training = module.training and torch.is_grad_enabled() and output.requires_grad
        if self._paused or not training:
            return
        if not args:
            raise CaptureError(
                f"head {name!r} was called with a keyword argument, which hooks do not see: pass "
                f"the representation as the first positional argument, head(h)."
            )
        shared = self._shared_output() if self._shared_output is not None else None
        h: Tensor = args[0]
        if shared is not None and _came_through_fsdp(h, shared):
            h = shared
        if h is not self.h:  # a new forward pass
            self._forget()
            self._passes, self._number = self._passes + 1, next(_numbers)
            self.h, self._h_version, self.group = h, h._version, running_group()
        self.outputs[name], self._versions[name] = output, output._version
        if output.grad_fn is not None:
            _marks(output.grad_fn)[self._key] = self._number
        if self.shared is not None and shared is not h:
            self._stray = name

    def check_one_pass(self, losses: Mapping[str, Tensor]) -> None:
        """No loss depends on a head's output in an earlier forward pass than the last.

        Raises:
            CaptureError: if one does.
        """
        if self._passes < 2:
            return
        for name, loss in losses.items():
            nodes, seen = [loss.grad_fn], set()
            while nodes:
                node = nodes.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                number = _marks(node).get(self._key)
                if number is None:
                    nodes += [following for following, _ in node.next_functions]
                elif number != self._number:
                    raise CaptureError(
                        f"task {name!r}: its loss depends on two forward passes, of which only "
                        f"the last would be aggregated. Pass both inputs through the model as one "
                        f"batch, or call `backward(losses)` after each pass and `step()` after "
                        f"the last."
                    )

    def check(self, names: list[str]) -> Tensor:
        """The shared representation of the last forward pass, if it can be used for ``names``.

        Raises:
            CaptureError: no forward pass, heads on different tensors, or nothing shared to train.
            FeatureError: the representation or an output was modified in place.
        """
        if self.h is None:
            raise CaptureError(
                "No forward pass was seen: run the model in training mode, with gradients "
                "enabled, before `backward` or `step(losses)`; every forward pass serves one. A "
                "model that ran under torch.compile before it was wrapped does not report: wrap "
                "first, and compile the shared network and the heads apart."
            )
        if self._stray is not None:
            self._raise_stray(self._stray)
        missing = [name for name in names if name not in self.outputs]
        if missing:
            seen = ", ".join(map(repr, self.outputs))
            raise CaptureError(
                f"task {missing[0]!r}: its head did not receive the same tensor as {seen} in the "
                f"last forward pass. All heads of one step must be applied to one and the same "
                f"tensor: compute it once, with dropout before the heads rather than in each, or "
                f"leave absent tasks out of `losses`. (Heads that FSDP2 shards one by one need "
                f"`shared_rep_hook`.)"
            )
        if not self.h.requires_grad:
            raise CaptureError(
                "The shared representation does not require gradients: the shared network is "
                "frozen or detached, so there is nothing to aggregate. Unfreeze it, or train the "
                "heads without BayesAgg."
            )
        if self.h._version != self._h_version:
            raise FeatureError(
                "The shared representation was modified in place after a head received it (an "
                "in-place activation in a head?). Use the out-of-place version of that operation."
            )
        for name in names:
            if self.outputs[name]._version != self._versions[name]:
                raise FeatureError(
                    f"task {name!r}: the head's output was modified in place before the loss. "
                    f"Use the out-of-place version of that operation."
                )
        return self.h

    def _raise_stray(self, name: str) -> None:
        if self._shared_type == "":
            raise CaptureError(
                f"head {name!r} ran, but `shared_rep_hook` did not: pass the module that produces "
                f"the heads' input, or None to use what the heads receive."
            )
        detail = (
            "a different tensor"
            if self._shared_output is not None
            else f"an object of type {self._shared_type}, not a tensor"
        )
        raise CaptureError(
            f"head {name!r} does not receive the very tensor that `shared_rep_hook` returns: the "
            f"hook saw {detail}. Something lies between (a functional activation, flatten or "
            f"dropout, a second backbone). Pass shared_rep_hook=None to use what the heads "
            f"receive, or make the step in between part of the shared module."
        )


def _came_through_fsdp(h: Tensor, shared: Tensor) -> bool:
    """Whether a head that is sharded by itself received ``shared``: FSDP2 passes on an alias."""
    node = h.grad_fn
    if node is None or node.name() != "RegisterPostBackwardFunctionBackward":
        return False
    source = node.next_functions[h.output_nr][0]
    return source is shared.grad_fn and h.data_ptr() == shared.data_ptr()


def _marks(node: torch.autograd.graph.Node) -> dict[str, Any]:
    """A dictionary that lives as long as the node of the graph."""
    return cast("dict[str, Any]", node.metadata)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

"""Last linear layers of modules, and parameters that may be sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bayesagg.errors import CaptureError, HeadError

__all__ = [
    "check_call",
    "check_private",
    "checked_linear",
    "computed",
    "last_layer",
    "sharded_like",
    "unchanged",
    "unwrapped",
    "whole",
]

_NAMES = ("weight", "bias")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def checked_linear(module: nn.Module, name: str) -> nn.Module:
    """The last linear layer of a module; a :class:`HeadError`, naming the head, without one."""
    module = unwrapped(last_layer(module))
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and not _like_linear(module):
        raise HeadError(
            f"{name} needs a linear module (nn.Linear, or a 1x1 nn.Conv), or an "
            f"nn.Sequential that ends in one, got {_named(module)}. Pass the last "
            f"linear layer of the head: what it receives are the head's features.{_adapted(module)}"
        )
    if isinstance(module, _CONVOLUTIONS) and (
        set(module.kernel_size) != {1}
        or set(module.stride) != {1}
        or module.groups != 1
        or (set(module.padding) != {0} and module.padding != "valid")
    ):
        raise HeadError(
            f"{name} needs a convolution of kernel size 1, stride 1, one group and no "
            f"padding, got {module}. Put such a linear layer behind it, and pass that."
        )
    weight = cast("Tensor", module.weight)
    if isinstance(weight, UninitializedParameter):
        raise HeadError(
            f"{name}: the lazy module is not initialised yet. Run one forward pass of the "
            f"model before wrapping the optimizer."
        )
    if weight.dim() < 2 or weight.untyped_storage().size() == 0:
        raise HeadError(
            f"{name}: the weights of its {type(module).__name__} are part of a flat parameter. "
            f"FullyShardedDataParallel makes such ones: shard by fully_shard (FSDP2) instead, or "
            f"use DistributedDataParallel."
        )
    others = [key for key, _ in module.named_parameters() if key not in _NAMES]
    if others and not computed(module):
        raise HeadError(
            f"{name}: its {type(module).__name__} has parameters beside weight and bias (LoRA?): "
            f"{', '.join(others)}. Give the task a plain linear layer of its own and train that, "
            f"or make it a LossTask(): its head is then not inferred."
        )
    return module


def _like_linear(module: nn.Module) -> bool:
    """Whether a layer of another library has the parameters of ``nn.Linear``.

    Whether it returns ``W h + b`` is looked at when a loss is first verified.
    """
    own = getattr(module, "_parameters", {})  # whatever was passed
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or "bias" not in own:  # an embedding has none
        return False
    if isinstance(weight, UninitializedParameter):
        return True
    return weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])


def _named(module: nn.Module) -> str:
    """The class of a module, in full where another library's may have a name of torch's."""
    kind = type(module)
    return (
        kind.__name__
        if kind.__module__.startswith("torch.nn")
        else f"{kind.__module__}.{kind.__name__}"
    )


def _adapted(module: nn.Module) -> str:
    """What to pass of a head that PEFT has wrapped."""
    if hasattr(module, "modules_to_save"):
        return " Here that is the copy that trains, `.modules_to_save['default']`."
    if hasattr(module, "base_layer"):
        return " An adapter is none: name the head in `modules_to_save`, not in `target_modules`."
    return ""


def check_call(module: nn.Module, name: str) -> None:
    """A head that is called in training is none of the kinds that cannot be read.

    Raises:
        CaptureError: if it is a replica of ``nn.DataParallel``, or trained with differential
            privacy.
    """
    if "_is_replica" in module.__dict__:
        raise CaptureError(
            f"task {name!r}: its head is a replica of nn.DataParallel, whose data lie on "
            f"several devices. Use DistributedDataParallel, a process a device, or one device."
        )
    check_private(module._parameters.values(), f"task {name!r}")


def check_private(parameters: Iterable[Tensor | None], what: str) -> None:
    """Parameters have no gradient per example, which Opacus would clip and add noise to.

    Raises:
        CaptureError: if one has.
    """
    if any(hasattr(parameter, "grad_sample") for parameter in parameters):
        raise CaptureError(
            f"{what}: gradients are taken per example, as by Opacus. Its promise of privacy would "
            f"not hold: a posterior sets heads and weighs tasks by the data themselves, without "
            f"clipping or noise. Train with Opacus's optimizer alone."
        )


def computed(linear: nn.Module) -> bool:
    """Whether weight or bias are made of other parameters.

    By a parametrization, or by the hooks of pruning and of the older weight and spectral norms.
    """
    return any(name not in linear._parameters for name in _NAMES)


def unwrapped(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped."""
    return cast("nn.Module", getattr(module, "_orig_mod", module))


def last_layer(module: nn.Module) -> nn.Module:
    """The last layer of a tower, as it is called."""
    inner = unwrapped(module)
    if isinstance(inner, nn.Sequential) and len(inner) > 0:
        return last_layer(inner[-1])
    return module


def whole(parameter: Tensor) -> Tensor:
    """A tensor that may be sharded (a ``DTensor``), gathered."""
    if type(parameter) is not nn.Parameter and hasattr(parameter, "full_tensor"):
        parameter = parameter.full_tensor()
    return parameter.detach()


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A value that every rank has, sharded as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@contextmanager
def unchanged(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whatever happens to some parameters inside, they have their values afterwards."""
    with torch.no_grad():
        before = [(parameter, parameter.clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)

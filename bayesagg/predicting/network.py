"""Running a user's network as it is for prediction, and what its heads read in that pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.errors import CaptureError, FeatureError, HeadError, PredictionError
from bayesagg.heads import Head

__all__ = ["Heads", "call", "check_finite", "moved"]


class Heads:
    """The heads of a model, by path, so that the model may be copied, and what they receive."""

    def __init__(self, model: nn.Module, heads: Mapping[str, Head]) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self.by_task, self.paths = dict(heads), dict[str, str]()
        for task, head in heads.items():
            if id(head.watched) not in names:
                raise HeadError(
                    f"task {task!r}: its head is no module of this model. Pass the model that was "
                    f"wrapped; where heads were replaced or the model was built anew since, wrap "
                    f"it again, or fit anew with Predictor.fit(model, heads, loader)."
                )
            self.paths[task] = names[id(head.watched)]

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """What every head receives in a model, in evaluation mode, while the context lasts.

        Afterwards every module is in the mode that it was in.
        """
        seen: dict[str, list[Tensor]] = {task: [] for task in self.paths}
        training = _in_training(model)
        handles = []
        try:
            for task, path in self.paths.items():
                try:
                    module = model.get_submodule(path)
                except AttributeError:
                    raise HeadError(
                        f"task {task!r}: the model has no module {path!r} any more. Its heads were "
                        f"changed after the predictor was made: make a new one."
                    ) from None
                hook = _noting(seen[task])
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for module in training:
                module.training = False
            yield seen
        finally:
            for module in training:
                module.training = True
            for handle in handles:
                handle.remove()

    def received(self, seen: dict[str, list[Tensor]], task: str) -> Tensor:
        """What a head received in its one call, ``[..., d]``, which is forgotten then.

        Raises:
            CaptureError: if it was not called once.
            HeadError: if the width is another than that of the head.
            PredictionError: on a device without double precision.
        """
        calls, head = seen[task], self.by_task[task]
        if len(calls) != 1:
            how = "was not used" if not calls else f"was used {len(calls)} times"
            raise CaptureError(
                f"task {task!r}: its head {how} in the forward pass. A prediction needs one call "
                f"of every head: pass inputs for which the model runs all of them, once each."
            )
        width = calls[0].shape[1 if head.channels_first else -1]
        if width != head.in_features:
            raise HeadError(
                f"task {task!r}: its head received {width} features, the predictor knows "
                f"{head.in_features}. Heads were changed after it was made: make a new one."
            )
        if calls[0].device.type == "mps":
            raise PredictionError(
                f"task {task!r}: predictions need double precision, which Apple's MPS lacks. Move "
                f"the model to the CPU, and make the predictor there."
            )
        return calls.pop()


def _in_training(model: nn.Module) -> list[nn.Module]:
    """Of all modules; by hand, as ``modules()`` takes a tenth of a small network's forward pass."""
    found, left = [], [model]
    while left:
        module = left.pop()
        if module.training:
            found.append(module)
        left.extend(child for child in module._modules.values() if child is not None)
    return found


def _thread() -> int:
    """Which one this is; a traced graph has none."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _noting(calls: list[Tensor]) -> Any:
    own = _thread()  # another may predict with the same network meanwhile

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _thread() == own:
            calls.append(args[0] if args else kwargs["input"])

    return note


def call(model: nn.Module, inputs: Any) -> Any:
    """Tuples and lists unpacked, dicts passed by keyword, anything else as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in nested containers, or an object that has ``to``, on a device."""
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [moved(part, device) for part in value]
    return value.to(device) if hasattr(value, "to") else value


def check_finite(task: str, features: Tensor) -> None:
    """Raise a :class:`FeatureError` for features that are not finite."""
    # A sum is finite only if all of it is, and costs a fraction; it may also overflow.
    total = features.sum(dtype=torch.promote_types(features.dtype, torch.float32))
    if not math.isfinite(total.item()) and not bool(torch.isfinite(features).all()):
        raise FeatureError(
            f"task {task!r}: what its head received is not finite. Check the inputs, and the "
            f"network's weights, for NaN and infinity."
        )

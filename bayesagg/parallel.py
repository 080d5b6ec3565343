"""Data-parallel ranks that take one step: the evidence of their batches is summed.

Every rank sees its own batch. What a posterior needs of it are sums over data, so the evidence of
all ranks together is that of the whole batch, and every rank computes the same posterior from it.
The gradient of each datum stays on its rank; DistributedDataParallel or FSDP2 averages the
gradients of the parameters as always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bayesagg.errors import BayesAggError, RankError

__all__ = ["Exchange", "ProcessGroup", "running_group", "sharding_group", "without_gathers"]

ProcessGroup = Any  # torch.distributed.ProcessGroup, which exists only where it was built
Setting = ProcessGroup | Literal["auto"] | None


class Exchange:
    """The ranks of one engine: who they are, what they agree on, and sums over them.

    Args:
        setting: a process group; ``"auto"``: the one over which gradients are averaged, found at
            each forward pass; ``None``: ranks have nothing to do with each other.

    Attributes:
        ranks: the group of the step under way; ``None``: there is one rank.
        sent: bytes that this rank handed to all-reduces in the last step.
    """

    def __init__(self, setting: Setting) -> None:
        if isinstance(setting, str) and setting != "auto":
            raise ValueError(
                f"process_group must be a process group, 'auto' or None, got {setting!r}."
            )
        self.setting = setting
        self.ranks: ProcessGroup | None = None
        self.sent = 0
        self._sharded: ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return Exchange(self.setting)  # a process group is a resource, not a value

    def __reduce__(self) -> tuple[type[Exchange], tuple[Any]]:
        return Exchange, (self.setting,)

    def start(
        self, seen: ProcessGroup | None, modules: Sequence[nn.Module], watching: bool = True
    ) -> None:
        """Find the ranks of a step: of the group that ran the forward pass, or that shards modules.

        Raises:
            BayesAggError: if no head is watched, which would see such a group, and nobody says
                which of several processes train one model.
        """
        self.ranks, self.sent = None, 0
        if not (dist.is_available() and dist.is_initialized()):
            return
        group = self.setting
        if isinstance(group, str):
            if seen is None and self._sharded is None:  # gathered parameters do not show it
                self._sharded = sharding_group(modules)
            group = self._sharded if seen is None else seen
            if group is None and not watching and dist.get_world_size() > 1:
                raise BayesAggError(
                    "no task has a head, so nothing shows which ranks train one model: pass "
                    "`process_group=torch.distributed.group.WORLD`, or None if each trains its own."
                )
        self.ranks = None if group is None or dist.get_world_size(group) == 1 else group

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.ranks is None else dist.get_world_size(self.ranks)

    @property
    def rank(self) -> int:
        """Of this process."""
        return 0 if self.ranks is None else dist.get_rank(self.ranks)

    def agree(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Flags of this step that any rank has raised; every rank must call.

        Raises a :class:`RankError` if another rank refused its batch.
        """
        if self.ranks is None:
            return list(flags)
        found = self._vote([0.0, 0.0, *map(float, flags)], device)
        refused, number, *raised = found
        if refused:
            who = f"rank {int(number) - 1}" if refused == 1 else f"{int(refused)} ranks"
            raise RankError(
                f"{who} refused its batch, so no rank takes this step: see the error raised there."
            )
        return [flag > 0 for flag in raised]

    def refuse(self, flags: int, device: torch.device) -> None:
        """Take part without a batch and its ``flags``: no rank waits, the others raise an error."""
        if self.ranks is not None:
            self._vote([1.0, self.rank + 1.0, *[0.0] * flags], device)

    def _vote(self, values: list[float], device: torch.device) -> list[float]:
        found: list[float] = self.sum([torch.tensor(values, device=device)])[0].tolist()
        return found

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks of tensors of one dtype, in one all-reduce; every rank must call."""
        if self.ranks is None or not parts:
            return list(parts)
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.sent += flat.numel() * flat.element_size()
        dist.all_reduce(flat, group=self.ranks)
        sizes = [part.numel() for part in parts]
        return [x.view_as(p) for x, p in zip(flat.split(sizes), parts, strict=True)]


def running_group() -> ProcessGroup | None:
    """The group of the DistributedDataParallel module whose forward pass is running."""
    active = DistributedDataParallel._get_active_ddp_module()
    return None if active is None else active.process_group


def sharding_group(modules: Sequence[nn.Module]) -> ProcessGroup | None:
    """The group over which FSDP2 shards parameters; an error for a mesh of several dimensions."""
    for module in modules:
        for parameter in module.parameters():
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is None:
                continue
            if mesh.ndim > 1:
                raise BayesAggError(
                    f"parameters lie on a mesh of {mesh.ndim} dimensions, which does not say "
                    f"which ranks see different data: pass `process_group=`, the group of those "
                    f"ranks."
                )
            return mesh.get_group()
    return None


@contextmanager
def without_gathers(outputs: Iterable[Tensor]) -> Iterator[None]:
    """Keep FSDP2 from gathering the trunk's weights while only losses are differentiated.

    Its hooks on the model's outputs take any gradient there for the start of the backward pass. A
    rank that refuses its batch before would leave the others waiting in that gather.
    """
    aside: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for output in outputs:
        hooks = output._backward_hooks or {}
        aside.append((hooks, dict(hooks)))
        for key, hook in list(hooks.items()):
            if type(getattr(hook, "__self__", None)).__name__ == "FSDPState":
                del hooks[key]
    try:
        yield
    finally:
        for hooks, all_hooks in aside:
            hooks.clear()  # in their order again
            hooks.update(all_hooks)

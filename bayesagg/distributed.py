"""Data-parallel ranks that take one step: the evidence of their batches is summed.

Every rank sees its own batch. What Eq. 2 and Eq. 8-10 say of it are sums over data, so the evidence
of all ranks together is that of the whole batch, and every rank computes the same posterior from
it. The gradient of each datum stays on its rank; DistributedDataParallel or FSDP2 averages the
gradients of the parameters as always.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bayesagg.errors import BayesAggError, RankError
from bayesagg.likelihoods import Block, Statistics

if TYPE_CHECKING:
    from bayesagg.engine import BayesAgg

__all__ = ["Exchange", "ProcessGroup", "bytes_per_step"]

ProcessGroup = Any  # torch.distributed.ProcessGroup, which exists only where it was built
_HEADER = 3  # ranks that refuse, the sum of their numbers plus one, ranks that overflowed


def bytes_per_step(engine: BayesAgg) -> int:
    """Bytes that one rank hands to the all-reduce of one step.

    With ``b`` bytes a number (8, or 4 under ``dtype=torch.float32``) it is
    ``b (3 + Σ_blocks [1 + G M (M + 1) / 2 + K (M + 1 + E)])``. A block are the heads of one
    likelihood: ``K`` tasks over ``M`` weights each, ``d + 1`` with a bias, ``(C - 1)(d + 1)`` for
    ``C`` classes. ``G`` is ``K``, but 1 for regression as long as no rank had a missing label.
    ``E`` is 2 for regression with a learned noise variance, 1 for classification under
    ``rule="likelihood"`` and 0 otherwise; learned noise sends ``b K`` more in a second all-reduce,
    which is included. Classification without a use for its posterior has ``M = 0``. In pre-training
    epochs but the last only ``3 b`` bytes are sent.

    Args:
        engine: a :class:`bayesagg.BayesAgg`, or ``wrapper.engine``.
    """
    exchange, blocks = engine._exchange, engine._blocks
    numbers = _HEADER + len(blocks)
    for index, block in enumerate(blocks):
        first, refined = block.extra_sums
        numbers += exchange.size(index, block, first) + refined * block.num_tasks
    return numbers * torch.finfo(engine.dtype).bits // 8


class Exchange:
    """Sums evidence over ranks in one flat all-reduce, which also carries refusals.

    Args:
        setting: a process group; ``"auto"``: the one over which gradients are averaged, found at
            each forward pass; ``None``: ranks have nothing to do with each other.
    """

    def __init__(self, setting: ProcessGroup | Literal["auto"] | None) -> None:
        if isinstance(setting, str) and setting != "auto":
            raise ValueError(
                f"process_group must be a process group, 'auto' or None, got {setting!r}."
            )
        self.setting = setting
        # Regression blocks whose labels were incomplete on some rank: a matrix for every task.
        self._wide: set[int] = set()
        self._triangles: dict[tuple[int, torch.device], Tensor] = {}
        self._sharded: ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return Exchange(self.setting)  # a process group is a resource, not a value

    def __reduce__(self) -> tuple[type[Exchange], tuple[Any]]:
        return Exchange, (self.setting,)

    def group(self, seen: ProcessGroup | None, modules: Sequence[nn.Module]) -> ProcessGroup | None:
        """The group to reduce over, ``None`` where there is one rank.

        Args:
            seen: the group of the DistributedDataParallel module that ran the forward pass.
            modules: whose parameters FSDP2 may have sharded.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.setting
        if isinstance(group, str):
            if seen is None and self._sharded is None:  # gathered parameters do not show it
                self._sharded = sharding_group(modules)
            group = self._sharded if seen is None else seen
        return None if group is None or dist.get_world_size(group) == 1 else group

    def size(self, index: int, block: Block, extras: int) -> int:
        """Numbers that a block sends."""
        k, m = block.num_tasks, block.parameters_per_task
        return self._matrices(index, block) * m * (m + 1) // 2 + k * (m + 1 + extras)

    def _matrices(self, index: int, block: Block) -> int:
        narrow = block.kind == "regression" and index not in self._wide
        return 1 if narrow else block.num_tasks

    def reduce(
        self,
        group: ProcessGroup,
        blocks: Sequence[Block],
        evidence: Sequence[Statistics] | None,
        device: torch.device,
    ) -> list[Statistics] | None:
        """Evidence of the whole batch, from that of this rank.

        Args:
            group: of the ranks; all of them must call.
            blocks: whose evidence is of use in this step, the same on every rank.
            evidence: by block; ``None``: gradients overflowed under a ``GradScaler``.
            device: of the model.

        Returns:
            by block; ``None`` if the gradients of some rank overflowed, which makes every rank's
            optimizer skip the step.

        Raises:
            RankError: if another rank refused its batch.
        """
        header = torch.tensor([0.0, 0.0, float(evidence is None)], device=device)
        parts = _nothing(blocks, device) if evidence is None else evidence
        return self._reduce(group, blocks, parts, header)

    def refuse(self, group: ProcessGroup, blocks: Sequence[Block], device: torch.device) -> None:
        """Take part without a batch, so that no rank waits; the others raise :class:`RankError`."""
        header = torch.tensor([1.0, dist.get_rank(group) + 1.0, 0.0], device=device)
        with suppress(RankError):  # this rank has an error of its own, which says more
            self._reduce(group, blocks, _nothing(blocks, device), header)

    def sum(self, group: ProcessGroup, parts: Sequence[Tensor]) -> list[Tensor]:
        """Plain sums over ranks, in one all-reduce."""
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        sizes = [part.numel() for part in parts]
        return [x.view_as(p) for x, p in zip(flat.split(sizes), parts, strict=True)]

    def _reduce(
        self,
        group: ProcessGroup,
        blocks: Sequence[Block],
        evidence: Sequence[Statistics],
        header: Tensor,
    ) -> list[Statistics] | None:
        dtype = blocks[0].dtype if blocks else torch.float64
        single = [self._matrices(index, block) == 1 for index, block in enumerate(blocks)]
        masked = [len(part.precision) > 1 for part in evidence]
        head = torch.cat(
            [header.to(dtype), torch.tensor(masked, dtype=dtype, device=header.device)]
        )
        parts = [head]
        for index, (block, part) in enumerate(zip(blocks, evidence, strict=True)):
            parts += self._pack(index, block, part)
        flat = torch.cat(parts)
        dist.all_reduce(flat, group=group)
        refused, number, overflowed, *wide = flat[: len(head)].tolist()
        if refused:
            who = f"rank {int(number) - 1}" if refused == 1 else f"{int(refused)} ranks"
            raise RankError(
                f"{who} refused its batch, so no rank takes this step: see the error raised there."
            )
        if overflowed:
            return None
        news = [one and bool(flag) for one, flag in zip(single, wide, strict=True)]
        if any(news):  # seen by all ranks alike: from now on these send a matrix for every task
            self._wide |= {index for index, new in enumerate(news) if new}
            return self._reduce(group, blocks, evidence, header)
        return self._unpack(flat[len(head) :], blocks, evidence, wide)

    def _pack(self, index: int, block: Block, part: Statistics) -> list[Tensor]:
        groups, precision = self._matrices(index, block), part.precision
        if len(precision) > groups:  # does not fit: the flag in the header asks for another round
            precision = torch.zeros_like(precision[:1])
        triangle = precision.flatten(1)[:, self._triangle(block, precision.device)]
        extras = [part.extra[key] for key in sorted(part.extra)]
        parts = [triangle.expand(groups, -1), part.shift, part.count, *extras]
        return [tensor.reshape(-1) for tensor in parts]

    def _unpack(
        self,
        flat: Tensor,
        blocks: Sequence[Block],
        evidence: Sequence[Statistics],
        wide: Sequence[float],
    ) -> list[Statistics]:
        result = []
        for index, (block, part) in enumerate(zip(blocks, evidence, strict=True)):
            k, m = block.num_tasks, block.parameters_per_task
            groups, keys = self._matrices(index, block), sorted(part.extra)
            mine, flat = flat.split(
                [size := self.size(index, block, len(keys)), flat.numel() - size]
            )
            triangle, shift, count, extra = mine.split(
                [groups * m * (m + 1) // 2, k * m, k, k * len(keys)]
            )
            triangle = triangle.view(groups, -1)
            if not wide[index]:  # every rank had every label: one matrix for all tasks
                triangle = triangle[:1]
            lower = flat.new_zeros(len(triangle), m * m)
            lower[:, self._triangle(block, flat.device)] = triangle
            lower = lower.view(len(triangle), m, m)
            values = [x.clone() for x in extra.view(len(keys), k)]
            result.append(
                Statistics(
                    lower + lower.tril(-1).mT,
                    shift.view(k, m).clone(),
                    count.clone(),
                    dict(zip(keys, values, strict=True)),
                )
            )
        return result

    def _triangle(self, block: Block, device: torch.device) -> Tensor:
        """Positions of a lower triangle in a flat matrix."""
        m = block.parameters_per_task
        if (m, device) not in self._triangles:
            rows, columns = torch.tril_indices(m, m, device=device)
            self._triangles[m, device] = rows * m + columns
        return self._triangles[m, device]


def _nothing(blocks: Sequence[Block], device: torch.device) -> list[Statistics]:
    """Evidence of no data at all, by the same path (and gathers of weights) as that of a batch."""
    result = []
    for block in blocks:
        labels = block.labels({}, 0, device)
        features = torch.zeros(0, block.width, dtype=block.dtype, device=device)
        part = block.statistics(features, labels)
        if block.kind == "regression":  # no label is missing where there is no datum
            part.precision = part.precision[:1]
        result.append(part)
    return result


def running_group() -> ProcessGroup | None:
    """The group of the DistributedDataParallel module whose forward pass is running."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    active = DistributedDataParallel._get_active_ddp_module()
    return None if active is None else active.process_group


def sharding_group(modules: Sequence[nn.Module]) -> ProcessGroup | None:
    """The group over which FSDP2 shards parameters of these modules.

    Raises:
        BayesAggError: for a mesh of several dimensions, where ranks may share data.
    """
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

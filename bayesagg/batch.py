"""What a step is given, checked: the forward pass, the losses, and the labels read off them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayesagg.capture import Capture, flatten
from bayesagg.distributed import without_gathers
from bayesagg.errors import FeatureError, LossError
from bayesagg.likelihoods import Block, Labels, Observation
from bayesagg.observe import by_task, check_finite, observe

__all__ = ["Batch", "read_batch"]


@dataclass
class Batch:
    """A forward pass and its losses, checked.

    Attributes:
        h: the shared representation.
        rows: it for every datum, ``[N, d]``, detached.
        total: sum of the losses.
        tasks: names of the tasks that take part.
        labels: by block; none where gradients overflowed under a ``GradScaler``.
    """

    h: Tensor
    rows: Tensor
    total: Tensor
    tasks: list[str]
    labels: list[Labels] = field(default_factory=list)


def read_batch(
    capture: Capture,
    blocks: Sequence[Block],
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
) -> Batch:
    """Check everything that a step is given, and read the labels; nothing is changed.

    Args:
        capture: that saw the forward pass.
        blocks: of all heads.
        losses: as of :meth:`bayesagg.BayesAgg.backward`.
        targets: as of :meth:`bayesagg.BayesAgg.backward`.

    Raises:
        BayesAggError: a specific subclass for each kind of bad input.
    """
    heads = capture.heads
    named = by_task(losses, heads, "losses")
    given = {}
    if targets is not None and len(targets) > 0:
        given = by_task(targets, heads, "targets", named)
    h = capture.check(list(named))
    check_finite(named)
    means = {name: loss if loss.dim() == 0 else loss.mean() for name, loss in named.items()}
    rows = flatten(h.detach(), next(iter(heads.values())).channels_first)
    batch = Batch(h, rows, torch.as_tensor(sum(means.values())), list(named))
    observed = _observe(capture, means, given)
    capture.check_one_pass(means)
    if observed is None:
        return batch
    with torch.no_grad():
        _check_features(rows, blocks[0].d, blocks[0].dtype)
        batch.labels = [block.labels(observed, len(rows), h.device) for block in blocks]
    return batch


def _observe(
    capture: Capture, losses: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> dict[str, Observation] | None:
    channels_first = next(iter(capture.heads.values())).channels_first
    outputs = capture.outputs
    try:
        with capture.paused(), without_gathers(outputs.values()):
            return observe(losses, outputs, targets, capture.heads, channels_first)
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise
        raise LossError(
            "a loss was compiled, and compiled functions cannot be differentiated twice, which "
            "reading its labels takes: leave the loss out of torch.compile, or pass `targets=`."
        ) from error


def _check_features(rows: Tensor, d: int, dtype: torch.dtype) -> None:
    if len(rows) == 0:
        raise FeatureError("the batch is empty: skip it, or drop the last batch of the loader.")
    if rows.shape[1] != d:
        raise FeatureError(
            f"the shared representation has {rows.shape[1]} dimensions, the heads take {d}."
        )
    if not bool(torch.isfinite(rows.sum(dtype=dtype))):
        raise FeatureError(
            "the shared representation has non-finite values: lower the learning rate, clip "
            "gradients, or check the inputs."
        )

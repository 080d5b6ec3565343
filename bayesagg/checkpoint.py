"""The engine's state in a checkpoint: what it was saved from, and whether it fits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bayesagg.errors import CheckpointError
from bayesagg.heads import Head
from bayesagg.likelihoods import Block, Rule, make_blocks

if TYPE_CHECKING:
    from bayesagg.engine import BayesAgg
    from bayesagg.optimizer import BayesAggWrapper

__all__ = ["PosteriorState", "describe", "read_blocks"]

_KEYS = {"rule", "heads", "epoch", "draws", "batches", "blocks", "task_weights"}


def describe(heads: Mapping[str, Head]) -> list[list[str]]:
    """Name and kind of every head, in their order; only the same heads can load a state."""
    return [
        [
            name,
            f"{head.kind} {head.in_features} -> {head.out_features}"
            + ("" if head.has_bias else ", no bias"),
        ]
        for name, head in heads.items()
    ]


def read_blocks(
    state: dict[str, Any], heads: Mapping[str, Head], dtype: torch.dtype, rule: Rule
) -> list[Block]:
    """Blocks of ``heads`` in the state of a checkpoint, which is checked.

    Args:
        state: what ``BayesAgg.get_extra_state`` returned.
        heads: by name.
        dtype: of the posterior algebra.
        rule: of the engine.

    Raises:
        CheckpointError: if the state was saved from other heads or with another rule, or is
            incomplete.
    """
    own = describe(heads)
    complete = isinstance(state, dict) and state.keys() == _KEYS
    if complete and state["heads"] != own:
        raise CheckpointError(
            f"the checkpoint was saved from other heads: it has {state['heads']}, this engine "
            f"{own}. Build the engine with the same heads, in the same order."
        )
    if not complete:
        raise CheckpointError(
            "the checkpoint's state of bayesagg is incomplete, or of another version. Save "
            "and load the whole `state_dict()`."
        )
    if state["rule"] != rule:
        raise CheckpointError(
            f"the checkpoint was saved with rule={state['rule']!r}, this engine has {rule!r}. "
            f"Build the engine with the rule it was saved with."
        )
    blocks = make_blocks(heads, dtype, rule)
    if len(state["blocks"]) != len(blocks):
        raise CheckpointError(
            "the checkpoint was saved from heads with other settings: heads that differ in "
            "`moments` or `num_samples` are computed apart. Use the settings it was saved with."
        )
    device = next(iter(heads.values())).linear.weight.device
    for block, saved in zip(blocks, state["blocks"], strict=True):
        block.load(saved, device)
    return blocks


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

    def __init__(self, owner: BayesAggWrapper | BayesAgg) -> None:
        self.owner = owner

    def state_dict(self) -> dict[str, Any]:
        """One value: a posterior that has not seen data has other entries than one that has."""
        file = io.BytesIO()
        owner = self.owner
        own = owner.get_extra_state() if isinstance(owner, nn.Module) else owner._own_state()
        torch.save(own, file)
        return {"state": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: if the state was saved from other heads; the owner is unchanged then.
        """
        file = io.BytesIO(state_dict["state"])
        own = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(self.owner, nn.Module):
            self.owner.set_extra_state(own)
        else:
            self.owner._load_own_state(own)

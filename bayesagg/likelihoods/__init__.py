"""Likelihoods by kind of head; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bayesagg.heads import Head
from bayesagg.likelihoods.base import Block, Rule
from bayesagg.likelihoods.binary import BinaryBlock
from bayesagg.likelihoods.data import Labels, Observation, Statistics
from bayesagg.likelihoods.multiclass import MulticlassBlock
from bayesagg.likelihoods.regression import RegressionBlock

__all__ = ["BLOCKS", "Block", "Labels", "Observation", "Rule", "Statistics", "make_blocks"]

BLOCKS: dict[str, type[Block]] = {
    block.kind: block for block in (RegressionBlock, BinaryBlock, MulticlassBlock)
}


def make_blocks(heads: Mapping[str, Head], dtype: torch.dtype, rule: Rule = "paper") -> list[Block]:
    """Heads that can be computed together, in the order of their first members."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, head in heads.items():
        settings = [getattr(head, setting, None) for setting in ("moments", "num_samples")]
        key: tuple[Any, ...] = (head.kind, head.has_bias, *settings)
        if head.kind == "multiclass":
            key += (head.out_features,)
        groups.setdefault(key, []).append(name)
    weighted = any(head.s > 0 for head in heads.values())
    return [
        BLOCKS[key[0]](names, [heads[name] for name in names], dtype, rule, weighted)
        for key, names in groups.items()
    ]

"""Descriptions of the heads of a network."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

Kind = Literal["regression", "binary", "multiclass"]


class HeadGroup(NamedTuple):
    """A linear head: its name, the kind of its tasks, the layer, and how many tasks it serves.

    The layer is a 1×1 convolution where outputs are maps.

    Losses follow the order of the groups, and within a group that of its outputs.
    """

    name: str
    kind: Kind
    module: nn.Linear | nn.Conv2d
    tasks: int

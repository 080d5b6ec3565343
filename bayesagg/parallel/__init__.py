"""Data-parallel ranks and sharded parameters."""

from bayesagg.parallel.exchange import (
    Exchange,
    ProcessGroup,
    running_group,
    sharding_group,
    without_gathers,
)

__all__ = ["Exchange", "ProcessGroup", "running_group", "sharding_group", "without_gathers"]

"""Small multi-task networks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.settings import INPUTS, OUTPUTS, WIDTH


class Net(nn.Module):
    """A trunk and one linear head per task; also a buffer, by batch normalisation."""

    def __init__(
        self,
        outputs: Mapping[str, int] = OUTPUTS,
        *,
        inputs: int = INPUTS,
        width: int = WIDTH,
        trunk: Callable[[], nn.Module] | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.trunk = (
            nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.Tanh())
            if trunk is None
            else trunk()  # made here, under the seed of `make_net`
        )
        self.heads = nn.ModuleDict({name: nn.Linear(width, o, bias) for name, o in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def make_net(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    **kwargs: Any,
) -> Net:
    """A network whose parameters depend on ``seed`` alone; the global generator is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**kwargs).to(device=device, dtype=dtype)


def plain_trunk(inputs: int = INPUTS, width: int = WIDTH) -> nn.Module:
    """One in which every datum is by itself: no batch normalisation."""
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh())


def plain_net(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    towers: bool = False,
    **kwargs: Any,
) -> Net:
    """As :func:`make_net`, with :func:`plain_trunk`; ``towers``: a hidden layer in every head."""
    net = make_net(device, dtype, trunk=plain_trunk, **kwargs)
    if towers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            for name, head in net.heads.items():
                tower = nn.Sequential(nn.Linear(WIDTH, head.in_features), nn.Tanh(), head)
                net.heads[name] = tower.to(device, dtype)
    return net

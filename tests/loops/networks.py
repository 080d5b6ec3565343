"""Networks of every build, small, without statistics of a batch: for tests of the loops."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bayesagg import LossTask
from tests.helpers.data import LOSSES, make_losses
from tests.helpers.nets import plain_net, plain_trunk
from tests.helpers.settings import INPUTS, OUTPUTS, WIDTH

Batch = Mapping[str, Tensor]


def linear_heads(outputs: Mapping[str, int] = OUTPUTS, width: int = WIDTH) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, o) for name, o in outputs.items()})


class Experts(nn.Module):
    """Every task mixes three experts by a gate of its own, and has a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(plain_trunk() for _ in range(3))
        self.gates = nn.ModuleDict({name: nn.Linear(INPUTS, 3) for name in OUTPUTS})
        self.heads = nn.ModuleDict(
            {n: nn.Sequential(plain_trunk(WIDTH, 3), nn.Linear(3, o)) for n, o in OUTPUTS.items()}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        each = torch.stack([expert(x) for expert in self.experts], 1)
        mixed = {n: (g(x).softmax(1)[:, :, None] * each).sum(1) for n, g in self.gates.items()}
        return {name: head(mixed[name]) for name, head in self.heads.items()}


class Stitched(nn.Module):
    """A column per task; the columns exchange their activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(plain_trunk() for _ in OUTPUTS)
        self.mix = nn.Parameter(0.8 * torch.eye(len(OUTPUTS)) + 0.1)
        self.second = nn.ModuleList(plain_trunk(WIDTH) for _ in OUTPUTS)
        self.heads = linear_heads()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mixed = torch.einsum("ij,jnd->ind", self.mix, torch.stack([f(x) for f in self.first]))
        parts = zip(self.heads.items(), self.second, mixed, strict=True)
        return {name: head(second(h)) for (name, head), second, h in parts}


class Backbones(nn.Module):
    """Two backbones: one head reads both, two heads read the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = plain_trunk(2), plain_trunk(3, 3)
        self.heads = linear_heads({"bin": 2, "cls": 3}, 3)
        self.heads["reg"] = nn.Linear(WIDTH + 3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        left, right = self.left(x[:, :2]), self.right(x[:, 2:])
        both = {"reg": torch.cat([left, right], 1)}
        return {name: head(both.get(name, right)) for name, head in self.heads.items()}


class Tokens(nn.Module):
    """A binary head for every input as a token, and heads for the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = plain_trunk(1)
        self.heads = linear_heads({"reg": 2, "bin": 1, "cls": 3})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x[:, :, None])
        read = {"bin": h}
        return {name: head(read.get(name, h.mean(1))) for name, head in self.heads.items()}


class Dense(nn.Module):
    """1×1 convolutions at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv1d(1, WIDTH, 3, padding=1), nn.Tanh())
        self.heads = nn.ModuleDict({n: nn.Conv1d(WIDTH, 1, 1) for n in ("reg", "bin")})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x[:, None])
        return {name: head(h) for name, head in self.heads.items()}


class Twice(nn.Module):
    """Every head reads two views of an input in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = plain_trunk(), linear_heads()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        views = [self.trunk(x), self.trunk(-x)]
        return {name: torch.cat([head(h) for h in views]) for name, head in self.heads.items()}


class Penalised(nn.Module):
    """The shared features have a penalty of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = plain_trunk(), linear_heads()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {**{name: head(h) for name, head in self.heads.items()}, "aux": h.square().mean()}


def frozen() -> nn.Module:
    """A head that is not trained."""
    net = plain_net()
    net.heads["cls"].requires_grad_(False)
    return net


def token_losses(out: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    signs = (batch["x"] > 0).to(batch["x"])[:, :, None]
    return make_losses(out, {**batch, "bin": signs})


def dense_losses(out: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    x = batch["x"][:, None]
    return make_losses(out, {"reg": x.sin(), "bin": (x > 0).to(x)})


def twice_losses(out: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    return {n: LOSSES[n](z, torch.cat([batch[n], batch[n]])) for n, z in out.items()}


def penalised_losses(out: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    heads = {name: z for name, z in out.items() if name != "aux"}
    return {**make_losses(heads, batch), "aux": 0.1 * out["aux"]}


@dataclass(frozen=True)
class Build:
    """How a network is made and trained; ``common``: its heads read one tensor."""

    make: Callable[[], nn.Module]
    common: bool
    losses: Callable[[Mapping[str, Tensor], Batch], dict[str, Tensor]] = make_losses
    passthrough: tuple[str, ...] = ()
    tasks: Mapping[str, LossTask] = field(default_factory=dict)

    def net(self) -> nn.Module:
        """The same for every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().double()

    def losses_of(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Of a batch of :func:`tests.helpers.make_batch` with its inputs under ``"x"``."""
        return self.losses(model(batch["x"]), batch)


NETWORKS = {
    "heads": Build(plain_net, True),
    "dense": Build(Dense, True, dense_losses),
    "frozen": Build(frozen, True),
    "twice": Build(Twice, True, twice_losses),
    "penalised": Build(Penalised, True, penalised_losses, ("aux",)),
    "weighed": Build(Penalised, True, penalised_losses, tasks={"aux": LossTask()}),
    "towers": Build(lambda: plain_net(towers=True), False),
    "experts": Build(Experts, False),
    "stitched": Build(Stitched, False),
    "backbones": Build(Backbones, False),
    "tokens": Build(Tokens, False, token_losses),
}

"""Dense and sequence heads: layouts, ignored positions and memory."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayesagg.rules.combine
import bayesagg.rules.stack
from bayesagg.posterior import weighted_gram
from tests.helpers.data import ignore, losses_over, make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import SAMPLED
from tests.helpers.states import assert_near, gradients
from tests.helpers.training import wrap


class Layout(nn.Module):
    """The same network on ``[N, d]``, on ``[B, T, d]`` or, with 1×1 convolutions, on maps."""

    def __init__(self, source: nn.Module, kind: str) -> None:
        super().__init__()
        self.kind = kind
        linear = source.trunk[0]
        self.trunk = nn.Sequential(self._like(linear), nn.Tanh())
        self.heads = nn.ModuleDict({n: self._like(head) for n, head in source.heads.items()})

    def _like(self, linear: nn.Linear) -> nn.Module:
        shape = {"conv1d": (1,), "conv2d": (1, 1), "conv3d": (1, 1, 1)}.get(self.kind)
        if shape is None:
            return copy.deepcopy(linear)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(shape)]
        module = conv(linear.in_features, linear.out_features, 1).to(linear.weight)
        with torch.no_grad():
            module.weight.copy_(linear.weight.view(*linear.weight.shape, *shape))
            module.bias.copy_(linear.bias)
        return module

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


# batch 2 times 6 positions
LAYOUTS = {
    "tokens": lambda t: t.view(2, 6, -1),
    "grid": lambda t: t.view(2, 3, 2, -1),
    "conv1d": lambda t: t.view(2, 6, -1).movedim(-1, 1),
    "conv2d": lambda t: t.view(2, 3, 2, -1).movedim(-1, 1),
    "conv3d": lambda t: t.view(2, 3, 2, 1, -1).movedim(-1, 1),
}


# Rule and its settings, whether labels are missing, and whether they are given.
CASES = [
    *(
        (rule, {}, *how)
        for rule in ("likelihood", "paper")
        for how in itertools.product([False, True], repeat=2)
    ),
    ("paper", {"covariance": "full"}, True, False),
]


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
@pytest.mark.parametrize(("rule", "kwargs", "missing", "given"), CASES)
def test_layouts_equal_the_flattened_computation(rule, kwargs, missing, given, kind, device, dtype):
    """Every position is a datum; one without labels says nothing."""
    flat = plain_net(device, dtype)
    nets = [flat, Layout(flat, kind)]
    settings = {name: {**SAMPLED.get(name, {}), "s": 0.5} for name in flat.heads}
    optimizers = [wrap(net, "sgd", rule, settings=settings, **kwargs) for net in nets]
    counts = torch.zeros(3)
    for index in range(6):
        x, labels = make_batch(device, dtype, seed=index, size=12)
        gaps = torch.zeros(3, 12, dtype=torch.bool, device=device)
        if missing:
            labels, gaps = ignore(labels, index)
        counts += (~gaps).sum(1).cpu() * (index > 2)
        for net, optimizer in zip(nets, optimizers, strict=True):
            view = LAYOUTS[kind] if net is not flat else lambda t: t
            last = 1 if net is not flat and kind.startswith("conv") else -1  # where outputs are
            shaped = {name: view(y) for name, y in labels.items()}
            shaped["cls"] = shaped["cls"].view(view(x).select(last, 0).shape)
            optimizer.zero_grad()
            h = net.trunk(view(x))
            h.retain_grad()
            out = {name: head(h) for name, head in net.heads.items()}
            if missing:
                losses = losses_over({**out, "cls": out["cls"].movedim(last, -1)}, shaped)
            else:
                losses = make_losses({**out, "cls": out["cls"].movedim(last, 1)}, shaped)
            optimizer.step(losses, targets=shaped if given else None)
            silent = (h.grad.movedim(last, -1).reshape(12, -1) == 0).all(1)
            assert torch.equal(silent, gaps.all(0))
        for one, two in zip(*(gradients(net).values() for net in nets), strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two.view(one.shape))
    for one, two in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, two.view_as(one))
    memories = [o.state_dict()["bayesagg"]["memory"] for o in optimizers]
    assert_near(*memories, tolerance=1e-7 if dtype == torch.float64 else 1e-3)
    if rule == "paper":
        seen = [group["full"]["count"][0] for group in memories[1]["groups"]]
        assert [int(count) for count in seen] == counts.tolist()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("missing", [False, True])
def test_memory_is_bounded(missing, rule, device, monkeypatch):
    """Tensors of many data, outputs and dimensions are made in chunks, to the same end."""
    outputs, size, chunk = {"reg": 16, "bin": 16, "cls": 3}, 4000, 1 << 13
    results, largest = [], []
    for bound in (1 << 30, chunk):
        for module in (bayesagg.rules.combine, bayesagg.rules.stack):
            monkeypatch.setattr(module, "_CHUNK", bound)
        monkeypatch.setattr(weighted_gram, "__defaults__", (bound,))
        net = plain_net(device, outputs=outputs)
        optimizer = wrap(net, "sgd", rule)
        for index in range(4):
            x, labels = make_batch(device, seed=index, size=size, outputs=outputs)
            losses = losses_over(net(x), ignore(labels, index)[0] if missing else labels)
            optimizer.zero_grad()
            with Largest() as seen:
                optimizer.step(losses)
        results.append([list(net.parameters()), optimizer.state_dict()["bayesagg"]["memory"]])
        largest.append(seen.numel)
    assert_near(*results)
    assert largest[1] <= max(8 * chunk, size * 35)  # outputs of all heads, which there are anyway
    if missing or rule == "paper":  # else the default rule takes products of matrices
        assert largest[1] < largest[0] / 2

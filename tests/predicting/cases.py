"""Networks whose features are known, and naive formulas over them, in float64."""

import torch

from tests.helpers.data import make_batch
from tests.helpers.settings import HEADS


def heads_of(net, **settings):
    return {n: HEADS[n](m, **settings.get(n, {})) for n, m in net.heads.items()}


def loader(batches=8, size=30, **kwargs):
    return [make_batch(seed=50 + i, size=size, **kwargs) for i in range(batches)]


def all_of(data):
    x = torch.cat([x for x, _ in data])
    return x, {n: torch.cat([y[n] for _, y in data]) for n in data[0][1]}


def features_of(net, x, bias=True):
    with torch.no_grad():
        h = net.trunk(x)
    return torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1) if bias else h

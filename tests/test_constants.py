"""Tensors that are kept can be used anywhere, wherever they were made."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from bayesagg.constants import kept


@kept
def made(number):
    return torch.full((2,), float(number))


def test_it_is_made_once():
    assert made(1) is made(1)
    assert made(2) is not made(1)
    first = made(1)
    made.cache_clear()
    assert made(1) is not first


def test_what_inference_made_has_gradients():
    made.cache_clear()
    with torch.inference_mode():
        made(3)
    x = torch.ones(2, requires_grad=True)
    (x * made(3)).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_a_traced_graph_leaves_nothing_behind():
    class Module(torch.nn.Module):
        def forward(self, x):
            return x * made(4)

    made.cache_clear()
    x = torch.ones(2)
    for _ in range(2):  # the second time with what the first has left
        assert torch.export.export(Module(), (x,)).module()(x).tolist() == [4.0, 4.0]
    assert not isinstance(made(4), FakeTensor)

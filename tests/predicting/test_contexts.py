"""The predictor in other precisions, under autocast and inference mode, in several threads."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bayesagg import acquisition
from bayesagg.predicting import MulticlassPrediction, Predictor
from tests.helpers.data import make_batch
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH
from tests.helpers.training import train, wrap
from tests.predicting.cases import heads_of, loader


def test_half_precision_is_for_the_network_alone():
    """Its digits are too few for variances."""
    net = plain_net().float()
    data = loader(dtype=torch.float32)
    predictor, x = Predictor.fit(net, heads_of(net), data).calibrate(data), data[0][0]
    expected = predictor(x)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(predictor).to(dtype)
        assert {p.dtype for p in low.model.parameters()} == {dtype}
        assert {b.dtype for b in low.posteriors.buffers()} == {torch.float32}
        for task, p in low(x.to(dtype)).items():
            assert p.stddev.dtype == torch.float32
            torch.testing.assert_close(p.stddev, expected[task].stddev, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("largest", [2560, 0])
def test_autocast_is_for_the_network_alone(largest):
    net = plain_net().float()
    data = [
        (x, {**y, "reg": 300 + 20 * y["reg"]}) for x, y in loader(batches=2, dtype=torch.float32)
    ]
    x = data[0][0]
    predictor = Predictor.fit(net, heads_of(net), data, max_parameters=largest)

    class Ready(nn.Module):
        """The features as they are under autocast, whatever surrounds it."""

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x)

    ready = Predictor(Ready(), heads_of(net))
    ready.posteriors.load_state_dict(predictor.posteriors.state_dict())

    def members(p):
        generator = torch.Generator().manual_seed(0)
        own = [p.mean, p.stddev, p.epistemic, p.output_variance, *p.interval(0.9)]
        own += [p.sample(3, generator=generator), p.distribution.entropy()]
        if not isinstance(p, MulticlassPrediction):
            own += [p.covariance(), acquisition.select(p, 4)]
        return own

    expected = [members(p) for p in ready(x).values()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [members(p) for p in predictor(x).values()]
        joint = acquisition.bald(predictor(x)["reg"], joint=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert joint == acquisition.bald(ready(x)["reg"], joint=True)


def test_several_threads_may_predict():
    net = plain_net().eval()
    predictor, x = Predictor.fit(net, heads_of(net), loader()), make_batch(seed=9, size=200)[0]
    rows = [x[i : i + 50] for i in range(0, 200, 50)]
    expected = [predictor(part)["reg"].mean for part in rows]
    both = threading.Barrier(4, timeout=60)

    def wait(*_):
        """Until all are inside."""
        both.wait()

    net.trunk.register_forward_hook(wait)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: predictor(part)["reg"].mean, rows))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("exact", [False, True])
def test_made_in_a_context_of_inference(rule, exact):
    """It can be differentiated through, loaded and moved outside of it."""
    net = plain_net()
    optimizer = wrap(net, rule=rule)
    train(net, optimizer, 2 * EPOCH + 2)
    data, x = loader(), make_batch(seed=9)[0].requires_grad_()
    expected = optimizer.predictor(net, data if exact else None).calibrate(data)
    with torch.inference_mode():
        predictor = optimizer.predictor(net, data if exact else None).calibrate(data)
        loaded = Predictor(net, heads_of(net))
        loaded.load_state_dict(predictor.state_dict())
    for one in (predictor, loaded):
        sum(p.stddev.sum() for p in one(x, differentiable=True).values()).backward()
        assert (one(x)["cls"].stddev == expected(x)["cls"].stddev).all()
        one.load_state_dict(expected.state_dict())
    assert (x.grad != 0).any()


def test_no_data_have_no_predictions():
    net = plain_net()
    predictor = Predictor.fit(net, heads_of(net), loader())
    x, _ = make_batch(size=3)
    for task, p in predictor(x[:0]).items():
        width = predictor(x)[task].mean.shape[1]
        members = p.mean, p.stddev, p.epistemic, *p.interval(0.9)
        assert all(member.shape == (0, width) for member in members)
        assert p.sample(5).shape == (5, 0, width)

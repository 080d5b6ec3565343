"""Constant, tiny and huge features, and logits that are certain: every number stays finite."""

import pytest
import torch
from torch import nn

from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net
from tests.helpers.settings import EPOCH, SAMPLED
from tests.helpers.states import assert_finite, snapshot
from tests.helpers.training import wrap


class Fixed(nn.Module):
    """A trunk that passes its inputs through, so that features are known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


WIDE = 6
FEATURES = {
    "normal": lambda x: x,
    "constant": lambda x: torch.full_like(x, 0.7),
    "constant_datum": lambda x: x[:1].expand_as(x),
    "duplicated": lambda x: x[:, :1].expand_as(x),
    "zero": lambda x: torch.zeros_like(x),
    "one_datum": lambda x: x[:1],
    "fewer_data_than_dimensions": lambda x: x[:3],
    "tiny": lambda x: x * 1e-6,
    "huge": lambda x: x * 1e6,
    "mixed_scales": lambda x: x * torch.logspace(-6, 6, x.shape[1]).to(x),
}


@pytest.mark.filterwarnings("ignore::bayesagg.errors.NumericalWarning")
@pytest.mark.parametrize("kind", sorted(FEATURES))
@pytest.mark.parametrize(
    ("rule", "kwargs", "noise", "bias"),
    [
        ("paper", {}, 1.0, True),
        ("paper", {}, "learned", False),
        ("paper", {"covariance": "full"}, 1.0, True),
        ("likelihood", {}, 1.0, False),
        ("likelihood", {}, "learned", True),
    ],
)
def test_hard_features(rule, kwargs, noise, bias, kind, device, dtype):
    """No NaN and no infinity in anything that a run leaves behind."""
    net = make_net(device, dtype, trunk=lambda: Fixed(WIDE), width=WIDE, bias=bias)
    settings = {"bin": SAMPLED["bin"], "reg": {"noise_variance": noise}}
    if rule == "paper":
        kwargs = {"steps_per_epoch": 1, **kwargs}
    optimizer = wrap(net, "adam", rule, settings=settings, **kwargs)
    for index in range(4 + EPOCH * (rule == "likelihood")):
        x, labels = make_batch(device, dtype, seed=index, inputs=WIDE)
        x = FEATURES[kind](x)
        labels = {name: y[: len(x)] for name, y in labels.items()}
        optimizer.zero_grad()
        optimizer.step(make_losses(net(x), labels))
        assert_finite(snapshot(net, optimizer)["gradients"])
    assert_finite(snapshot(net, optimizer))


@pytest.mark.filterwarnings("ignore::bayesagg.errors.NumericalWarning")
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("readout", ["gradient", "posterior"])
@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
def test_saturated_logits(single, readout, right, size, rule, device):
    """Certain of everything, rightly or wrongly: labels, posterior and gradients stay finite."""
    dtype = torch.float32 if single else torch.float64
    outputs = {"bin": 2, "cls": 3}
    net = make_net(device, dtype, outputs=outputs, trunk=lambda: Fixed(WIDE), width=WIDE)
    with torch.no_grad():
        for head in net.heads.values():
            head.weight *= size
    settings = {name: {"readout": readout} for name in outputs}
    kwargs = {"steps_per_epoch": 1} if rule == "paper" else {"warmup": 1}
    optimizer = wrap(net, "adam", rule, settings=settings, **kwargs)
    for index in range(4):
        x, _ = make_batch(device, dtype, seed=index, inputs=WIDE)
        out = net(x)
        labels = {"bin": (out["bin"] > 0).to(x), "cls": out["cls"].argmax(1)}
        if not right:
            labels = {"bin": 1 - labels["bin"], "cls": out["cls"].argmin(1)}
        optimizer.zero_grad()
        optimizer.step(make_losses(out, labels))
        assert_finite(snapshot(net, optimizer)["gradients"])
    assert_finite(snapshot(net, optimizer))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("noise", [None, 0.5])
@pytest.mark.parametrize("zeros", [1, EPOCH + 2])
def test_labels_that_are_zero_at_first(zeros, noise, masked, rule, device, dtype):
    """Counts that are rare: no step has told yet how large labels are, nor how noisy."""
    net = make_net(device, dtype, outputs={"reg": 2, "bin": 1})
    optimizer = wrap(net, "adam", rule, settings={"reg": {"noise_variance": noise}})
    for index in range(zeros + 2 * EPOCH):
        # Of eight data a mean is exact, and so are labels that are read off it.
        x, labels = make_batch(device, dtype, seed=index, size=8, outputs={"reg": 2, "bin": 1})
        if index < zeros:
            labels["reg"][:, 0] = 0
        labels["reg"][:4, 0] = torch.nan if masked else 0
        known = ~labels["reg"].isnan()
        out = net(x)
        losses = make_losses({"bin": out["bin"]}, labels)
        losses["reg"] = (out["reg"] - labels["reg"])[known].square().mean()
        optimizer.zero_grad()
        optimizer.step(losses)
        assert_finite(snapshot(net, optimizer))
        assert sum(w.sum().item() for w in optimizer.task_weights.values()) == pytest.approx(1)

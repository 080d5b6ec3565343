"""Maps: every pixel is a datum."""

import torch
from torch import nn

from bayesagg import BinaryHead, MulticlassHead, RegressionHead
from bayesagg.predicting import Predictor


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
        self.cls, self.reg = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 1)
        self.bin, self.tokens = nn.Conv2d(4, 1, 1), nn.Linear(4, 2)

    def forward(self, x):
        h = self.trunk(x)
        out = {"cls": self.cls(h), "reg": self.reg(h), "bin": self.bin(h)}
        return {**out, "tokens": self.tokens(h.movedim(1, -1))}


def test_every_pixel_is_a_datum():
    net = Maps().double()
    heads = {
        "cls": MulticlassHead(net.cls),
        "reg": RegressionHead(net.reg),
        "bin": BinaryHead(net.bin),
        "tokens": RegressionHead(net.tokens),
    }
    x = torch.randn(6, 2, 4, 5).double()
    labels = {
        "cls": torch.randint(3, (6, 4, 5)),
        "reg": torch.randn(6, 2, 4, 5).double(),
        "bin": (torch.rand(6, 1, 4, 5) > 0.5).double(),
        "tokens": torch.randn(6, 4, 5, 2).double(),
    }
    labels["cls"][:, 0], labels["reg"][:, 1, :, 2] = -100, torch.nan
    predictor = Predictor.fit(net, heads, [(x, labels)]).calibrate([(x, labels)])
    out, found = net(x), predictor(x)
    for task, p in found.items():
        for part in (p.mean, p.stddev, p.epistemic, p.aleatoric, *p.interval(0.8)):
            assert part.shape == out[task].shape
        assert p.sample(3).shape == (3, *out[task].shape)
    assert found["cls"].distribution.log_prob(labels["cls"].clamp(min=0)).shape == (6, 4, 5)
    assert found["cls"].sample(2, noise=True).shape == (2, 6, 4, 5)
    assert found["reg"].distribution.log_prob(labels["reg"]).shape == (6, 2, 4, 5)
    flat = nn.Module()
    flat.trunk, flat.reg = nn.Identity(), nn.Linear(4, 2).double()
    flat.forward = lambda h: flat.reg(flat.trunk(h))
    rows = net.trunk(x).detach().movedim(1, -1).reshape(-1, 4)
    y = {"reg": labels["reg"].movedim(1, -1).reshape(-1, 2)}
    plain = Predictor.fit(flat, {"reg": RegressionHead(flat.reg)}, [(rows, y)]).calibrate(
        [(rows, y)]
    )
    expected = plain(rows)["reg"].stddev.view(6, 4, 5, 2).movedim(-1, 1)
    torch.testing.assert_close(found["reg"].stddev, expected)


def test_large_maps_go_in_chunks(monkeypatch):
    from bayesagg.predicting import data, prediction

    net = Maps().double()
    heads = {"cls": MulticlassHead(net.cls), "reg": RegressionHead(net.reg)}
    net.bin, net.tokens = nn.Identity(), nn.Identity()
    x = torch.randn(3, 2, 6, 6).double()
    labels = {"cls": torch.randint(3, (3, 6, 6)), "reg": torch.randn(3, 2, 6, 6).double()}
    labels["reg"][:, 0, 0] = torch.nan

    def results():
        predictor = Predictor.fit(net, heads, [(x, labels)]).calibrate([(x, labels)])
        found = predictor(x)
        return [f(p) for p in found.values() for f in (lambda p: p.mean, lambda p: p.stddev)]

    whole = results()
    for module in (prediction, data):
        monkeypatch.setattr(module, "CHUNK", 40)
    for a, b in zip(whole, results(), strict=True):
        torch.testing.assert_close(a, b)

"""Losses that are not the likelihood of their head, by kind of head and name."""

import torch
from torch.nn import functional as F


def one_hot(y, z):
    return F.one_hot(y, z.shape[1]).to(z.dtype)


def ramp(z):
    """Per-example weights from 1 to 3."""
    return torch.linspace(1, 3, len(z), dtype=z.dtype, device=z.device)


def focal_binary(z, y):
    p = torch.sigmoid(z)
    loss = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    return loss * (y * (1 - p) + (1 - y) * p) ** 2


def focal_classes(z, y):
    logs = torch.log_softmax(z, 1).gather(1, y[:, None])[:, 0]
    return -((1 - logs.exp()) ** 2) * logs


def elementwise(loss, **kwargs):
    return lambda z, y: loss(z, y, reduction="none", **kwargs)


# One loss an output, or a datum of classes.
EACH = {
    "reg": {
        "absolute": elementwise(F.l1_loss),
        "huber": elementwise(F.huber_loss, delta=0.1),
        "smooth absolute": elementwise(F.smooth_l1_loss, beta=0.1),
        "cosh": lambda z, y: torch.log(torch.cosh(z - y)),
    },
    "bin": {
        "classes": lambda z, y: F.binary_cross_entropy_with_logits(
            z, y, pos_weight=z.new_tensor(3.0), reduction="none"
        ),
        "focal": focal_binary,
        "brier": lambda z, y: (z.sigmoid() - y).square(),
        "hinge": lambda z, y: (1 - z * (2 * y - 1)).relu(),
    },
    "cls": {
        "focal": focal_classes,
        "smoothed": elementwise(F.cross_entropy, label_smoothing=0.1),
        "one-vs-rest": lambda z, y: F.binary_cross_entropy_with_logits(
            z, one_hot(y, z), reduction="none"
        ).mean(1),
        "brier": lambda z, y: (z.softmax(1) - one_hot(y, z)).square().mean(1),
    },
}


def means(kind, *names):
    """Of losses of :data:`EACH`, by name."""

    def mean(name):
        return lambda z, y: EACH[kind][name](z, y).mean()

    return {name: mean(name) for name in names}


# Functions of the outputs of each datum, or of all residuals: of any batch and any scale.
SMOOTH = {
    "reg": {
        **means("reg", *EACH["reg"]),
        "log of the mean": lambda z, y: torch.log(F.mse_loss(z, y)),
        "sum of logs": lambda z, y: torch.log((z - y).square().mean(0)).sum(),
        "root": lambda z, y: F.mse_loss(z, y).sqrt(),
        "weighted": lambda z, y: (ramp(z)[:, None] * (z - y).square()).mean(),
    },
    "bin": {
        **means("bin", "classes", "focal"),
        "weighted": lambda z, y: F.binary_cross_entropy_with_logits(z, y, ramp(z)[:, None]),
    },
    "cls": {
        **means("cls", "focal", "smoothed"),
        "classes": lambda z, y: F.cross_entropy(z, y, weight=ramp(z[0])),
        "weighted": lambda z, y: (ramp(z) * F.cross_entropy(z, y, reduction="none")).mean(),
    },
}
ALL = {
    "reg": {
        **SMOOTH["reg"],
        "roots": lambda z, y: F.mse_loss(z, y, reduction="none").sum(1).sqrt().mean(),
        "penalty": lambda z, y: F.mse_loss(z, y) + 0.1 * z.square().mean(),
        "constant": lambda z, y: F.mse_loss(z, y) + 1,
        "pooled": lambda z, y: F.mse_loss(z.mean(0), y[0]),
        "pooled outputs": lambda z, y: F.mse_loss(z.sum(1), y[:, 0]),
        "broadcast": lambda z, y: (z[:, :1] - y[:, 0]).square().mean(),
        "activation": lambda z, y: F.mse_loss(z.tanh(), y),
        "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, y.sigmoid()),
    },
    "bin": {
        **SMOOTH["bin"],
        **means("bin", "brier", "hinge"),
        "pooled": lambda z, y: F.binary_cross_entropy_with_logits(z.mean(0), y[0]),
        "softmax": lambda z, y: F.cross_entropy(z, y[:, 0].long()),
        "squared": F.mse_loss,
    },
    "cls": {
        **SMOOTH["cls"],
        **means("cls", "one-vs-rest", "brier"),
        "raw": F.nll_loss,
        "temperature": lambda z, y: F.cross_entropy(z / 2, y),
        "pooled": lambda z, y: F.cross_entropy(z.mean(0, keepdim=True), y[:1]),
    },
}

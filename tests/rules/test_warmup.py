"""The first steps of the default rule where labels are large: as in units of the labels.

Where they are not, these steps are those of the plain losses, to the last bit
(``test_linear_scalarization_is_the_plain_loop``). The paper's rule has another beginning.
"""

import math

import pytest
import torch
from torch import nn

from bayesagg import BayesAggWrapper, LikelihoodRule, LossTask
from tests.helpers.data import losses_over, make_batch, without
from tests.helpers.nets import plain_net
from tests.helpers.settings import GRADIENT, WIDTH
from tests.helpers.training import make_heads

# Factor and offset of the labels of a regression, and a factor of a loss without a head.
SHIFT = {
    "offset": (1.0, 40.0, 1.0),
    "unit": (300.0, 0.0, 1.0),
    "small unit": (1e-3, 0.0, 1.0),
    "loss": (1.0, 0.0, 300.0),
}


def large(index, shift, missing):
    """A batch whose first regression output has other units, and some labels missing."""
    x, labels = make_batch(seed=index)
    factor, offset, _ = SHIFT[shift]
    labels["reg"][:, 0] = labels["reg"][:, 0] * factor + offset
    if missing:
        gaps = torch.zeros(len(x), 2, dtype=torch.bool)
        gaps[:3, 0], gaps[: 6 if index == 0 else 2, 1] = True, True
        labels = without(labels, "reg", gaps)
    return x, labels


def each(out, labels):
    """Losses as they are given, and in parts of one number per task: the outputs of "reg"."""
    losses = losses_over(out, labels)
    y = labels["reg"]
    squares = torch.where(y.isnan(), 0.0, out["reg"] - y.nan_to_num()) ** 2
    columns = squares.sum(0) / (~y.isnan()).sum()
    torch.testing.assert_close(columns.sum(), losses["reg"])
    return losses, [*columns, losses["bin"], losses["cls"]]


@pytest.mark.parametrize("missing", [False, True], ids=["whole", "missing"])
@pytest.mark.parametrize("within", [1.0, 5.0, math.inf], ids=["sgd", "adam", "as it comes"])
@pytest.mark.parametrize("shift", SHIFT)
def test_gradients_are_as_written_out(shift, within, missing):
    """Of losses over mean squares of labels, about as long as the plain; heads have their own."""
    net = plain_net()
    net.aux = nn.Linear(WIDTH, 1).double()
    tasks = {**make_heads(net, reg=GRADIENT["reg"]), "aux": LossTask()}
    base = torch.optim.SGD if within == 1.0 else torch.optim.Adam
    rule = LikelihoodRule(warmup=99, keep_length=math.isfinite(within))
    optimizer = BayesAggWrapper(base(net.parameters(), 0.01), net.trunk, tasks, rule=rule)
    total = weight = torch.zeros(2, dtype=torch.float64)
    values = []
    for index in range(4):
        x, labels = large(index, shift, missing)
        h = net.trunk(x)
        out = {name: head(h) for name, head in net.heads.items()}
        losses, parts = each(out, labels)
        aux = net.aux(h).square().mean() * SHIFT[shift][2]
        past = values or [aux.detach()]  # before this step
        fading = 0.995 ** torch.arange(len(past), dtype=torch.float64).flip(0)
        beside_level = ((fading * torch.stack(past)).sum() / fading.sum()).clamp(min=1)
        values.append(aux.detach())

        known = ~labels["reg"].isnan()
        level = labels["reg"].nan_to_num().square().sum(0) / known.sum(0).clamp(min=1)
        total = torch.where(known.any(0), 0.99 * total + 0.01 * level, total)
        weight = torch.where(known.any(0), 0.99 * weight + 0.01, weight)
        levels = torch.where(weight > 0, total / weight, 1.0).clamp(min=1)
        factors = [*(1 / levels), torch.tensor(1.0), torch.tensor(1.0)]
        plain, own = sum(losses.values()), sum(f * p for f, p in zip(factors, parts, strict=True))
        theirs, ours, beside = (
            torch.autograd.grad(loss, h, retain_graph=True)[0] for loss in (plain, own, aux)
        )
        small = shift == "small unit"
        ratio = ours.norm() / theirs.norm()
        scale = torch.tensor(1.0) if small else ratio.clamp(1 / within, within) / ratio
        beside_factor = torch.tensor(1.0) if small else scale.clamp(max=1) / beside_level
        at_features = (theirs if small else ours * scale) + beside * beside_factor
        wanted = [
            *torch.autograd.grad(h, [*net.trunk.parameters()], at_features, retain_graph=True),
            *torch.autograd.grad(plain, [*net.heads.parameters()], retain_graph=True),
            *torch.autograd.grad(beside_factor * aux, [*net.aux.parameters()], retain_graph=True),
        ]
        net.zero_grad()
        optimizer.backward({**losses, "aux": aux}, {"reg": labels["reg"]} if missing else None)
        for parameter, gradient in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)

        weights = torch.cat([*optimizer.task_weights.values()])
        shares = torch.ones(6, dtype=torch.float64)
        if not small:
            shares[:2] = 1 / levels
            shares[:5] *= scale
            shares[5] = beside_factor
        torch.testing.assert_close(weights.to(shares), shares / shares.sum())


@pytest.mark.parametrize("within", [1.0, 5.0, math.inf], ids=["sgd", "adam", "as it comes"])
def test_losses_without_any_head(within):
    """Over their running means, where these are large; about as large a sum as before."""
    torch.manual_seed(0)
    weights = nn.Parameter(torch.rand(2, dtype=torch.float64) + 1)
    base = torch.optim.SGD if within == 1.0 else torch.optim.Adam
    rule = LikelihoodRule(warmup=99, keep_length=math.isfinite(within))
    tasks = {"large": LossTask(), "small": LossTask()}
    optimizer = BayesAggWrapper(base([weights], 0.01), None, tasks, rule=rule)
    for size in (900.0, 3.0):  # the second is as large as the means of the steps before say
        losses = weights.square() * torch.tensor([size, 0.5])
        if size == 900.0:
            level = losses.detach().clamp(min=1)
        ratio = (losses.detach() / level).sum() / losses.detach().sum()
        factors = ratio.clamp(1 / within, within) / ratio / level
        wanted = torch.autograd.grad((factors * losses).sum(), weights, retain_graph=True)[0]
        optimizer.zero_grad()
        optimizer.backward({"large": losses[0], "small": losses[1]})
        torch.testing.assert_close(weights.grad, wanted)

"""The end of the default rule's warm-up: not while its heads would be worse than those there are.

The paper's rule has another beginning: its pre-training takes the epochs that it is told.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BayesAggWrapper, BinaryHead, LikelihoodRule, RegressionHead
from tests.helpers.data import losses_over
from tests.helpers.settings import HEADS, OUTPUTS
from tests.helpers.states import assert_same, snapshot

D, N, WARMUP, STEPS = 4, 9, 12, 10
MEMORY, GAMMA = 100, 0.2
CURVATURE = {"reg": 1.0, "bin": 0.25, "cls": 0.5}


def batch(step, missing):
    """Features that nothing shapes, and labels, of which the first columns have some missing."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    labels = {
        "reg": y.clone(),
        "bin": (y > 0).double(),
        "cls": y[:, 0].gt(0).long() + (y[:, 1] > 1),
    }
    if missing:
        labels["reg"][:2, 0], labels["bin"][:3, 0], labels["cls"][:4] = math.nan, math.nan, -100
    return x, labels


def misfits(kind, z, y):
    """Of every output, or of the classes, with the number of labels."""
    z, y = z.detach(), y if kind != "cls" else y[:, None]
    known = y != -100 if kind == "cls" else ~y.isnan()
    if kind == "cls":
        every = F.cross_entropy(z, y[:, 0], reduction="none", ignore_index=-100)[:, None]
    elif kind == "bin":
        every = F.binary_cross_entropy_with_logits(z, y.nan_to_num(), reduction="none")
    else:
        every = (z - y.nan_to_num()) ** 2
    return torch.where(known, every, 0).sum(0), known.sum(0)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_compared_is_as_written_out(bias, missing):
    """Posterior means before a step against the heads, on its data, over ten steps."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({k: nn.Linear(D, o, bias) for k, o in OUTPUTS.items()}).double()
    rule = LikelihoodRule(memory=MEMORY, warmup=WARMUP, prior_variance=GAMMA)
    engine = BayesAgg(None, {k: HEADS[k](module) for k, module in modules.items()}, rule=rule)
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(WARMUP):
        x, labels = batch(step, missing)
        h = torch.cat([x.detach(), torch.ones(N, 1).double()], 1) if bias else x.detach()
        outputs = {k: module(x) for k, module in modules.items()}
        ratios, data = [], []
        for unit in engine._memory.units if step >= WARMUP - STEPS else ():
            column = 0
            for kind in unit.names:
                weights = []
                for o in range(OUTPUTS[kind]):
                    group, row = (o, 0) if unit.wide else (0, column)
                    gram, eta = unit.gram[group], unit.shift[group, row]
                    ridge = 1 / (CURVATURE[kind] * GAMMA)
                    if kind == "reg":
                        total, level = unit.scale[group, :2, 0 if unit.wide else column]
                        ridge = ridge * total / level
                    weights.append(torch.linalg.solve(gram + ridge * torch.eye(len(gram)), eta))
                    column += 1
                ours, count = misfits(kind, h @ torch.stack(weights, 1), labels[kind])
                theirs, _ = misfits(kind, outputs[kind], labels[kind])
                ratios += (ours / theirs).log().tolist()
                data += (count / h.shape[1]).tolist()
        if ratios:
            sums += torch.tensor([sum(ratios) / len(ratios), sum(data) / len(data), 1.0])
        engine.backward(losses_over(outputs, labels))
        with torch.no_grad():
            for module in modules.values():
                module.weight.mul_(1.05)  # heads that move while they are compared
    torch.testing.assert_close(engine._memory.trial, sums)


def start(trained, width=256, **settings):
    """A network with wide features, and heads that know the labels already, or nothing."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, width), nn.ReLU()).double()
    heads = nn.ModuleDict({"y": nn.Linear(width, 2), "up": nn.Linear(width, 1)}).double()
    x = torch.randn(4 * width, 8, dtype=torch.float64)
    labels = {"y": torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], 1), "up": 2.0 * x[:, 3:4]}
    if trained:
        with torch.no_grad():
            h = F.pad(trunk(x), (0, 1), value=1.0)
            for name, head in heads.items():
                found = torch.linalg.solve(h.mT @ h + torch.eye(width + 1), h.mT @ labels[name])
                head.weight.copy_(found[:-1].mT)
                head.bias.copy_(found[-1])
    labels["y"] += 0.1 * torch.randn_like(labels["y"])
    labels["up"] = (labels["up"] + torch.randn_like(labels["up"]) > 0).double()
    net = nn.ModuleDict({"trunk": trunk, "heads": heads})
    described = {
        "y": RegressionHead(heads["y"], **settings),
        "up": BinaryHead(heads["up"], **settings),
    }
    base = torch.optim.Adam(net.parameters(), lr=1e-4)
    return net, BayesAggWrapper(base, trunk, described), x, labels


def losses_of(net, x, labels, seed, rows=8):
    """Of some data."""
    some = torch.randint(len(x), (rows,), generator=torch.Generator().manual_seed(seed))
    h = net["trunk"](x[some])
    return {
        "y": F.mse_loss(net["heads"]["y"](h), labels["y"][some]),
        "up": F.binary_cross_entropy_with_logits(net["heads"]["up"](h), labels["up"][some]),
    }


def run(net, optimizer, x, labels, steps, rows=8):
    """Loss before every step, of all data."""
    found = []
    for step in steps:
        with torch.no_grad():
            found.append(F.mse_loss(net["heads"]["y"](net["trunk"](x)), labels["y"]).item())
        optimizer.zero_grad()
        optimizer.step(losses_of(net, x, labels, step, rows))
    return found


def test_trained_heads_are_not_replaced_by_worse_ones():
    """Until there are twelve data for each of their weights at the latest."""
    net, optimizer, x, labels = start(trained=True)
    memory = optimizer.engine._memory
    losses = run(net, optimizer, x, labels, range(60))
    assert memory.due == 100 and memory.steps > LikelihoodRule.warmup
    assert max(losses) < 1.05 * losses[0]
    assert len({float(w) for one in optimizer.task_weights.values() for w in one}) == 1
    run(net, optimizer, x, labels, range(60, 99), rows=40)
    assert memory.due == 100
    run(net, optimizer, x, labels, range(99, 102), rows=40)
    assert memory.due is None


@pytest.mark.parametrize("settings", [{}, {"readout": "gradient"}])
def test_other_heads_are_handed_over_at_once(settings):
    """Those that know nothing yet, and trained ones that no posterior sets."""
    net, optimizer, x, labels = start(trained=bool(settings), **settings)
    run(net, optimizer, x, labels, range(LikelihoodRule.warmup))
    assert optimizer.engine._memory.due == LikelihoodRule.warmup
    run(net, optimizer, x, labels, [99])
    assert optimizer.engine._memory.due is None


def test_scalars_that_share_a_backward_pass_do_not_miss_the_end():
    """They count one each, so that no step is the fiftieth."""
    net, optimizer, x, labels = start(trained=False)
    run(net, optimizer, x, labels, [0])
    memory = optimizer.engine._memory
    while memory.steps <= LikelihoodRule.warmup:
        assert memory.due == LikelihoodRule.warmup
        seeds = memory.steps, memory.steps + 1
        optimizer.zero_grad()
        sum(optimizer.loss(losses_of(net, x, labels, seed)) for seed in seeds).backward()
        optimizer.step()
    assert memory.steps == LikelihoodRule.warmup + 1
    run(net, optimizer, x, labels, [1])
    assert memory.due is None


def test_a_run_that_is_resumed_on_trial_ends_in_the_same_bits():
    whole = start(trained=True)
    run(*whole, range(60))
    halves = start(trained=True)
    run(*halves, range(45))
    again = start(trained=False)
    again[0].load_state_dict(halves[0].state_dict())
    again[1].load_state_dict(halves[1].state_dict())
    assert again[1].engine._memory.trial is not None
    run(*again, range(45, 60))
    assert_same(*(snapshot(one[0], one[1]) for one in (whole, again)))

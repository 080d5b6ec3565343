"""What a step of twenty tasks costs beyond a plain one: operators, and looks at the device.

Of the default rule; ``examples.benchmark`` prints those of tasks without a missing label.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, BinaryHead, LikelihoodRule, LossTask, RegressionHead
from examples.benchmark import measuring

TASKS, ROWS, WARMUP = 20, 64, 4


def absolute(z, y, known):
    return (z - y).abs().mean()


def squared(z, y, known):
    return F.mse_loss(z[known], y[known])


def logistic(z, y, known):
    return F.binary_cross_entropy_with_logits(z[known], (y[known] > 0).float())


def counts(make_head, loss):
    """Operators and looks at the device of a step."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
    heads = [nn.Linear(32, 1) for _ in range(TASKS)]
    parameters = [p for module in (trunk, *heads) for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    if make_head is not None:
        # A memory that is set: else the rule counts the data at first.
        tasks = [make_head(head) for head in heads]
        rule = LikelihoodRule(memory=10 * ROWS, warmup=WARMUP)
        optimizer = BayesAggWrapper(optimizer, trunk, tasks, rule=rule)

    def step():
        x, y = torch.randn(ROWS, 8), torch.randn(TASKS, ROWS, 1)
        known = torch.rand(TASKS, ROWS, 1) < 0.8
        h = trunk(x)
        losses = [loss(head(h), *some) for head, *some in zip(heads, y, known, strict=True)]
        optimizer.zero_grad()
        if make_head is None:
            sum(losses).backward()
            optimizer.step()
        else:
            optimizer.step(losses)

    for _ in range(2 * WARMUP):
        step()
    return measuring.counts(step)


@pytest.mark.parametrize(
    ("make_head", "loss", "operators", "looks"),
    [
        (lambda head: LossTask(), absolute, 620, 0),
        (RegressionHead, squared, 1050, 1),
        (BinaryHead, logistic, 1100, 1),
    ],
    ids=["losses without heads", "regressions with masks", "binary tasks with masks"],
)
def test_twenty_tasks_beyond_a_plain_step(make_head, loss, operators, looks):
    ours, plain = counts(make_head, loss), counts(None, loss)
    assert ours[0] - plain[0] <= operators, (ours, plain)
    assert ours[1] - plain[1] <= looks, (ours, plain)

"""Epochs, evidence and settings of the paper's rule, which the default rule does not have.

What a step computes is in ``test_paper_equations.py``, what the memory does in ``test_paper.py``.
"""

import pytest
import torch

from bayesagg.posterior import augment
from tests.helpers.data import make_batch
from tests.helpers.settings import EPOCH, QUICK, SAMPLED
from tests.helpers.training import train, train_step, wrap


def memory(optimizer):
    """What a checkpoint says of it."""
    return optimizer.state_dict()["bayesagg"]["memory"]


def counts(optimizer, key):
    """Labels in the evidence of every group."""
    return [group[key]["count"].tolist() for group in memory(optimizer)["groups"]]


def test_without_a_number_of_steps_epochs_end_by_hand(net):
    optimizer = wrap(net, settings=SAMPLED, steps_per_epoch=None)
    train(net, optimizer, 5)
    assert memory(optimizer)["epoch"] == 0
    optimizer.end_epoch()
    assert memory(optimizer)["epoch"] == 1
    optimizer.end_epoch()  # without a step in between
    assert memory(optimizer)["epoch"] == 1
    train(net, optimizer, 1)
    optimizer.end_epoch()
    assert memory(optimizer)["epoch"] == 2
    assert counts(optimizer, "full") == [[6, 6], [6, 6], [6]]
    assert [group["running"] for group in memory(optimizer)["groups"]] == [None] * 3


def test_an_epoch_may_be_ended_early(net):
    """``end_epoch`` also starts the count of steps anew."""
    optimizer = wrap(net, settings=SAMPLED)
    train(net, optimizer, EPOCH - 1)
    optimizer.end_epoch()
    train(net, optimizer, EPOCH - 1)
    assert memory(optimizer)["epoch"] == 1
    train(net, optimizer, 1)
    assert memory(optimizer)["epoch"] == 2


@pytest.mark.parametrize("base", ["momentum", "adamw"])  # both decay weights
def test_the_posterior_sets_its_heads_alone(base, net):
    """Untouched by weight decay and momentum within an epoch, the ridge solution at its end."""
    settings = {**QUICK, "reg": {"prior_variance": 0.5, "noise_variance": 0.3}}
    optimizer = wrap(net, base, settings=settings)
    features = []
    net.trunk.register_forward_hook(lambda m, a, out: features.append(out.detach()))
    head = net.heads["reg"]
    train(net, optimizer, EPOCH)
    for epoch in (1, 2):
        features.clear()
        targets = []
        for index in range(EPOCH * epoch, EPOCH * (epoch + 1)):
            before = [p.detach().clone() for p in head.parameters()]
            like = next(net.parameters())
            targets.append(make_batch(like.device, like.dtype, seed=index)[1]["reg"])
            train_step(net, optimizer, index)
            unchanged = [torch.equal(b, p) for b, p in zip(before, head.parameters(), strict=True)]
            assert unchanged == [index % EPOCH != EPOCH - 1] * 2
            assert head.weight.grad is None and head.bias.grad is None
        h = augment(torch.cat(features), True)
        eye = torch.eye(h.shape[1], device=h.device, dtype=h.dtype)
        expected = torch.linalg.solve(h.mT @ h / 0.3 + eye / 0.5, h.mT @ torch.cat(targets) / 0.3)
        torch.testing.assert_close(
            torch.cat([head.weight, head.bias[:, None]], 1).detach(), expected.mT
        )

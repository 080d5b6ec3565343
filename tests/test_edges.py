"""Inputs at the edge of what is allowed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bayesagg import BayesAggWrapper, RegressionHead
from bayesagg.errors import FeatureError, LossError


def _wrapped(**settings):
    trunk, head = nn.Linear(3, 4), nn.Linear(4, 1)
    base = torch.optim.SGD([*trunk.parameters(), *head.parameters()], 0.1)
    return trunk, head, BayesAggWrapper(base, trunk, {"y": RegressionHead(head)}, **settings)


def test_empty_batch():
    trunk, head, optimizer = _wrapped()
    loss = nn.functional.mse_loss(
        head(trunk(torch.zeros(0, 3))), torch.zeros(0, 1), reduction="sum"
    )
    with pytest.raises(FeatureError, match="empty"):
        optimizer.step({"y": loss})


def test_a_loss_that_reaches_h_past_its_head_is_refused():
    """The replaced gradient would silently leave the rest of it out."""
    trunk, head, optimizer = _wrapped()
    h = trunk(torch.randn(8, 3))
    loss = nn.functional.mse_loss(head(h), torch.randn(8, 1)) + 10 * h.square().mean()
    with pytest.raises(LossError, match="'y'"):
        optimizer.step({"y": loss})


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_per_epoch_is_a_positive_integer(steps):
    with pytest.raises(ValueError, match="steps_per_epoch"):
        _wrapped(steps_per_epoch=steps)

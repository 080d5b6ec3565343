"""Data that come sorted by a task's labels: a warning that names it, and none for other orders."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from bayesagg import BayesAgg
from tests.helpers.data import LOSSES, losses_over, make_batch, without
from tests.helpers.settings import FOREVER, HEADS, OUTPUTS, RULES

D, N = 4, 40 * 16
NAMES = list(OUTPUTS)


@pytest.fixture(scope="module")
def data():
    return make_batch(size=N, inputs=D)


def warned(rule, data, order, size=16, losses=losses_over):
    """Tasks that are warned of, in one pass over data in an order."""
    x, labels = data
    modules = nn.ModuleDict({k: nn.Linear(D, o) for k, o in OUTPUTS.items()}).double()
    heads = {k: HEADS[k](module, readout="gradient") for k, module in modules.items()}
    engine = BayesAgg(None, heads, rule=replace(RULES[rule], **FOREVER[rule]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in order.split(size):
            h = x[rows].requires_grad_()
            outputs = {k: module(h) for k, module in modules.items()}
            engine.backward(losses(outputs, {k: y[rows] for k, y in labels.items()}))
    found = [str(w.message) for w in caught if "sorted by its labels" in str(w.message)]
    assert all("Shuffle the data" in message for message in found)
    return sorted(name for name in NAMES for message in found if f"task {name!r}" in message)


def by(labels, name):
    """From the smallest label of a task, or of its first output, to the largest."""
    y = labels[name]
    return (y if name == "cls" else y[:, 0]).argsort(stable=True)


@pytest.mark.parametrize("name", NAMES)
def test_sorted_data_warn_and_name_the_task(rule, data, name):
    order = by(data[1], name)
    found = warned(rule, data, order)
    # Binary labels are the signs of the regressions' here: sorted together, or nearly.
    assert name in found and (name == "cls") == ("cls" in found)


@pytest.mark.parametrize("size", [1, 16])
def test_shuffled_data_do_not(rule, data, size):
    for seed in range(2):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
        assert warned(rule, data, order[: 60 * size], size) == []


def test_batches_of_one_kind_in_a_random_order_do_not(rule, data):
    """As of a sampler that draws a group for every batch."""
    groups = by(data[1], "reg").view(-1, 16)
    some = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    assert warned(rule, data, groups[some].flatten()) == []


@pytest.mark.parametrize("before", [38, 62])
def test_a_class_that_lasts_for_longer_than_is_looked_at(rule, data, before):
    """All labels the same say nothing yet, wherever the next class begins."""
    first, second = (torch.nonzero(data[1]["cls"] == c)[:, 0] for c in range(2))
    order = torch.cat([first.repeat(9)[: before * 16], second.repeat(9)[: 50 * 16]])
    assert "cls" in warned(rule, data, order)


def test_labels_far_from_zero(rule, data):
    """In single precision, whose rounding of their squares is more than their variance."""
    x, labels = data
    far = x, {**labels, "reg": (labels["reg"] + 1e5).float(), "bin": labels["bin"].float()}
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))

    def losses(outputs, y):
        outputs = {k: z.float() for k, z in outputs.items()}
        return {k: LOSSES[k](outputs[k], y[k]) for k in outputs}

    assert "reg" in warned(rule, far, by(labels, "reg"), losses=losses)
    assert warned(rule, far, shuffled, losses=losses) == []


def test_missing_labels(rule, data):
    x, labels = data
    gaps = torch.rand(N, generator=torch.Generator().manual_seed(0)) < 0.5
    few = x, without(labels, "reg", gaps)
    assert "reg" in warned(rule, few, by(labels, "reg"))
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert warned(rule, few, shuffled) == []

"""Network × loop × rule: every loop takes the steps of the plain one.

``docs/networks-and-loops.md`` is the table of these tests.
"""

import functools
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bayesagg.errors import CaptureError, HeadError
from tests.helpers.settings import EPOCH, QUICK
from tests.helpers.states import assert_finite, assert_near
from tests.helpers.training import make_heads, wrap
from tests.loops.clients import CLIENTS, Job, batches_of, plain, state_of
from tests.loops.networks import NETWORKS
from tests.loops.runs import assert_equal_runs, batch_of, half, result

# Of the clients, about speed, themselves and their own dependencies; of torch.compile's parts.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 2 * EPOCH
BATCHES = batches_of(STEPS)


def start(name, rule):
    """A network and its wrapper; adam, as most have it."""
    build = NETWORKS[name]
    net = build.net()
    heads = {**make_heads(net, rule, **QUICK), **build.tasks}
    kwargs = {"heads": heads, "shared_rep_hook": None, "passthrough": build.passthrough}
    return net, wrap(net, "adam", rule, **kwargs), build.losses_of


class Recomputed(nn.Module):
    """The network, of which nothing is kept for the backward pass."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


def checkpointed(job):
    """``torch.utils.checkpoint`` around the whole."""
    plain(replace(job, net=Recomputed(job.net)))


def compiled(job):
    """``torch.compile`` of the whole."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain(replace(job, net=torch.compile(job.net, backend="eager")))
    torch._dynamo.reset()


LOOPS = {**CLIENTS, "checkpointed": checkpointed, "compiled": compiled}
# These take their time, and a network of every kind will do: heads on one tensor and on several,
# losses without a head. The Trainer is a loop over Accelerate's, and compilation knows no rules.
FEW = {
    "huggingface": {"heads", "weighed", "towers", "tokens"},
    "compiled": {"heads", "dense", "penalised", "towers", "experts"},
}
CELLS = [
    (name, loop, rule)
    for name, build in NETWORKS.items()
    for loop in ("plain", *LOOPS, "resumed", "ddp")
    for rule in ("likelihood", "paper")
    if name in FEW.get(loop, NETWORKS)
    and (rule == "likelihood" or (build.common and (loop != "compiled" or name == "heads")))
]


@functools.cache
def end_of_the_plain_loop(name, rule):
    """What the others are compared with."""
    net, wrapper, losses_of = start(name, rule)
    plain(Job(net, wrapper, BATCHES, losses_of))
    return state_of(net, wrapper)


def resumed(name, rule):
    """Half of the steps, and the other half by what was saved."""
    net, wrapper, losses_of = start(name, rule)
    plain(Job(net, wrapper, BATCHES[:EPOCH], losses_of))
    other, again, _ = start(name, rule)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(wrapper.state_dict())
    plain(Job(other, again, BATCHES[EPOCH:], losses_of))
    return state_of(other, again)


def in_ranks(rank, name, rule):
    """Half of every batch; all of it without ranks."""
    net, wrapper, losses_of = start(name, rule)
    model = net if rank is None else DistributedDataParallel(net)
    for index in range(STEPS):
        x, labels = batch_of(index, half(rank))
        wrapper.zero_grad()
        wrapper.step(losses_of(model, {"x": x, **labels}))
    return result(net, wrapper)


@pytest.mark.parametrize(("name", "loop", "rule"), CELLS)
def test_a_network_in_a_loop(name, loop, rule, request, tmp_path):
    """The plain loop trains; the others end where it does."""
    if loop == "ddp":
        both = request.getfixturevalue("ranks").run(in_ranks, name, rule)
        assert_equal_runs(in_ranks(None, name, rule), both, rule)
        return
    expected = end_of_the_plain_loop(name, rule)
    if loop == "plain":
        for key, before in start(name, rule)[0].named_parameters():
            assert torch.equal(before, expected["parameters"][key]) != before.requires_grad
        assert_finite(expected)
        return
    if loop == "resumed":
        found = resumed(name, rule)
    else:
        net, wrapper, losses_of = start(name, rule)
        LOOPS[loop](Job(net, wrapper, BATCHES, losses_of, tmp_path))
        found = state_of(net, wrapper)
    for key in ("parameters", "engine", "base"):
        assert_near(found[key], expected[key], key)


@pytest.mark.parametrize("name", [name for name, build in NETWORKS.items() if not build.common])
def test_the_paper_s_rule_names_the_one_that_serves(name):
    """Where heads read different tensors it has no common h, and sends nobody in a circle."""
    with pytest.raises((CaptureError, HeadError), match="default rule"):
        net, wrapper, losses_of = start(name, "paper")
        wrapper.step(losses_of(net, BATCHES[0]))


def test_the_table_in_the_documentation_is_that_of_these_tests():
    """Every cell names a test, and no test is without a cell."""
    page = Path(__file__).parents[2] / "docs" / "networks-and-loops.md"
    text = page.read_text(encoding="utf-8").split("\n## ")[0]
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    )
    loops = [loop.strip("`") for loop in header[1:]]
    named = [
        (first.split("`")[1], loop, rule)
        for first, *cells in rows
        for loop, cell in zip(loops, cells, strict=True)
        for rule in {"both": ("likelihood", "paper"), "default": ("likelihood",), "–": ()}[cell]
    ]
    assert sorted(named) == sorted(CELLS)

"""FSDP2: parameters sharded over two ranks, the step and the posterior of one process."""

import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from bayesagg import RegressionHead
from bayesagg.errors import BayesAggError, HeadError
from tests.helpers.data import make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH, GRADIENT, OPTIMIZERS, READOUT
from tests.helpers.states import difference
from tests.helpers.training import make_engine, wrap
from tests.loops.runs import (
    assert_equal_ranks,
    assert_equal_runs,
    assert_halves_are_the_whole,
    batch_of,
    half,
    result,
    steps,
    trained,
)

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="FSDP2 needs torch 2.6 or newer"
)

# Which modules are sharded by themselves, before the whole.
PARTS = {
    "whole": lambda net: [],
    "trunk": lambda net: [net.trunk],
    "layers": lambda net: [net.trunk[0]],
    "heads": lambda net: [net.trunk, *net.heads.values()],
}


def sharded(net, parts="trunk", **kwargs):
    mesh = init_device_mesh("cpu", (2,))
    for part in PARTS[parts](net):
        fsdp.fully_shard(part, mesh=mesh, **kwargs)
    return fsdp.fully_shard(net, mesh=mesh, **kwargs)


# Sharding concerns who writes the heads; what else may be set is in test_distributed.py.
@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=["default", "gradient_readout"])
def test_two_sharded_halves_are_the_whole(settings, rule, ranks):
    """Through linear scalarization and two epochs after it."""
    assert_halves_are_the_whole(ranks, rule, sharded, settings=settings)


@pytest.mark.parametrize("parts", sorted(PARTS))
@pytest.mark.parametrize("towers", [False, True], ids=["heads", "towers"])
def test_whatever_is_sharded_by_itself(towers, parts, rule, ranks):
    """With heads that the posterior writes, sharded beside the whole or by themselves."""
    if towers and rule == "paper":
        pytest.skip("the paper's rule needs one shared representation")
    kwargs = {"shared_rep_hook": None} if parts == "heads" else {}
    how = functools.partial(sharded, parts=parts)
    assert_halves_are_the_whole(ranks, rule, how, towers=towers, settings=READOUT, **kwargs)


@pytest.mark.parametrize("reshard", [True, False])
def test_adam_and_resharding(reshard, rule, ranks):
    how = functools.partial(sharded, reshard_after_forward=reshard)
    assert_halves_are_the_whole(ranks, rule, how, base="adam")


def by_hand(rank, rule, parts):
    """The engine alone; an evaluation has the weights gathered whenever heads may be written."""
    net = plain_net() if rank is None else sharded(plain_net(), parts)
    engine = make_engine(net, rule, steps_per_epoch=None)
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    seen = []
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        optimizer.zero_grad()
        losses = make_losses(net(x), labels)
        engine(losses).backward()
        optimizer.step()
        with torch.no_grad():
            net(x)
        if index % EPOCH == EPOCH - 1:
            engine.end_epoch()
            with torch.no_grad():
                seen.append(net(x)["reg"].clone())
    if rank is not None:
        net.reshard()
    return result(net, engine), seen


@pytest.mark.parametrize("parts", ["whole", "heads"])
def test_heads_are_written_while_they_are_gathered(parts, rule, ranks):
    """An evaluation leaves gathered copies in place of the parameters that are to be written."""
    one, outputs = by_hand(None, rule, parts)
    both = ranks.run(by_hand, rule, parts)
    assert_equal_runs(one, [found for found, _ in both], rule)
    for rank, (_, seen) in enumerate(both):
        torch.testing.assert_close(seen, [out[half(rank)] for out in outputs])


def on_two_dimensions(rank, rule):
    net = plain_net()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    fsdp.fully_shard(net, mesh=mesh)
    try:
        wrap(net, rule=rule)
    except BayesAggError as error:
        message = str(error)
    optimizer = wrap(net, "adam", rule, process_group=torch.distributed.group.WORLD)
    steps(net, optimizer, range(8), rank)
    return message, result(net, optimizer)


def test_a_mesh_of_two_dimensions_needs_a_group(rule, ranks):
    """It does not say which ranks see data of their own."""
    both = ranks.run(on_two_dimensions, rule)
    assert all("process_group" in message for message, _ in both)
    assert_equal_runs(trained(None, rule, base="adam"), [found for _, found in both], rule)


def refusing(rank, rule, parts, bad, absent):
    """A bad batch on rank 1 in one step, a task that is absent on rank 0 in another one."""
    net = sharded(plain_net(), parts)
    optimizer = wrap(net, "sgd", rule, settings=READOUT)
    names, changed = [], None
    for index in range(7):
        x, labels = batch_of(index, half(rank))
        losses = make_losses(net(x), labels)
        if index == bad and rank == 1:
            losses["cls"] = losses["cls"] * torch.inf
        if index == absent and rank == 0:  # every rank still reduces its gradient
            del losses["bin"]
        optimizer.zero_grad()
        before = optimizer.engine.get_extra_state()
        try:
            optimizer.step(losses)
        except BayesAggError as error:
            names.append(type(error).__name__)
            changed = difference(before, optimizer.engine.get_extra_state())
    return names, changed, result(net, optimizer)


@pytest.mark.parametrize(
    ("parts", "bad", "absent"),
    [("trunk", 4, None), ("trunk", None, 1), ("trunk", None, 5), ("trunk", 4, 5), ("heads", 4, 5)],
)
def test_errors_and_absent_tasks_leave_no_rank_waiting(parts, bad, absent, rule, ranks):
    """Weights are gathered by all ranks or none."""
    (zero, left, first), (one, right, second) = ranks.run(refusing, rule, parts, bad, absent)
    errors = (["RankError"], ["LossError"]) if bad else ([], [])
    assert (zero, one) == errors
    assert left is right is None
    assert_equal_ranks([first, second])


def flattened(rank, original):
    """What a head of FSDP1, whose modules have views of one flat parameter, is told."""
    net = plain_net()
    cpu = torch.device("cpu")
    fsdp.FullyShardedDataParallel(net, use_orig_params=original, device_id=cpu)
    try:
        RegressionHead(net.heads["reg"])
    except HeadError as error:
        return str(error)


@pytest.mark.parametrize("original", [True, False])
def test_flat_parameters_are_refused(original, ranks):
    for told in ranks.run(flattened, original):
        assert "part of a flat parameter" in told and "fully_shard" in told

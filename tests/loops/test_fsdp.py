"""FSDP2: parameters sharded over two ranks, the step and the posterior of one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from bayesagg.errors import BayesAggError, CaptureError
from tests.helpers import (
    OPTIMIZERS,
    PaperBayesAgg,
    assert_same,
    make_heads,
    make_losses,
    make_net,
    wrap,
)
from tests.loops.test_distributed import (
    EPOCH,
    SETTINGS,
    assert_equal_runs,
    batch_of,
    half,
    run,
    trunk,
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


def sharded(parts="whole", **kwargs):
    net = make_net(trunk=trunk)
    mesh = init_device_mesh("cpu", (2,))
    for part in PARTS[parts](net):
        fsdp.fully_shard(part, mesh=mesh, **kwargs)
    return fsdp.fully_shard(net, mesh=mesh, **kwargs)


def gathered(net, engine):
    """What has to agree, whole."""
    return {
        "parameters": {name: p.full_tensor().detach() for name, p in net.named_parameters()},
        "engine": engine.get_extra_state(),
        "weights": dict(engine.task_weights),
    }


def together(rank, settings, parts, base="momentum", kwargs=None):
    net = sharded(parts, **(kwargs or {}))
    optimizer = wrap(net, base, settings=settings)
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        losses = make_losses(net(x), labels)
        optimizer.zero_grad()
        optimizer.step(losses)
    return gathered(net, optimizer.engine)


def alone(settings, base="momentum"):
    net = make_net(trunk=trunk)
    return run(net, net, wrap(net, base, settings=settings), 8)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [("posterior_readout", parts) for parts in sorted(PARTS)]
    + [(settings, "trunk") for settings in sorted(SETTINGS) if settings != "posterior_readout"],
)
def test_two_sharded_halves_are_the_whole(settings, parts, ranks):
    """Over pre-training and two epochs after it, with heads that the posterior writes."""
    assert_equal_runs(alone(SETTINGS[settings]), ranks.run(together, SETTINGS[settings], parts))


@pytest.mark.parametrize("reshard", [True, False])
def test_adam_and_resharding(reshard, ranks):
    both = ranks.run(together, {}, "trunk", "adam", {"reshard_after_forward": reshard})
    assert_equal_runs(alone({}, "adam"), both)


def by_hand(rank, parts):
    """The engine alone; epochs end while an evaluation has the weights gathered."""
    net = sharded(parts)
    engine = PaperBayesAgg(net.trunk, make_heads(net))
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    seen = []
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        optimizer.zero_grad()
        engine.backward(make_losses(net(x), labels))
        optimizer.step()
        if index % EPOCH == EPOCH - 1:
            with torch.no_grad():
                net(x)
            engine.end_epoch()
            with torch.no_grad():
                seen.append(net(x)["reg"].detach().clone())
    net.reshard()
    return gathered(net, engine), seen


@pytest.mark.parametrize("parts", ["whole", "heads"])
def test_heads_are_written_while_they_are_gathered(parts, ranks):
    """An evaluation leaves gathered copies in place of the parameters that are to be written."""
    net = make_net(trunk=trunk)
    engine = PaperBayesAgg(net.trunk, make_heads(net))
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    outputs = []
    for index in range(8):
        x, labels = batch_of(index)
        optimizer.zero_grad()
        engine.backward(make_losses(net(x), labels))
        optimizer.step()
        if index % EPOCH == EPOCH - 1:
            engine.end_epoch()
            outputs.append(net(x)["reg"].detach())
    one = {
        "parameters": {name: p.detach() for name, p in net.named_parameters()},
        "engine": engine.get_extra_state(),
        "weights": dict(engine.task_weights),
    }
    both = ranks.run(by_hand, parts)
    assert_equal_runs(one, [found for found, _ in both])
    for rank, (_, seen) in enumerate(both):
        torch.testing.assert_close(seen, [out[half(rank)] for out in outputs])


def without_the_hook(rank, parts):
    net = sharded(parts)
    optimizer = wrap(net, "sgd", shared_rep_hook=None, pretrain_epochs=0)
    x, labels = batch_of(0, half(rank))
    try:
        optimizer.step(make_losses(net(x), labels))
    except CaptureError as error:
        return str(error)
    return None


def test_heads_sharded_one_by_one_need_the_shared_module(ranks):
    assert ranks.run(without_the_hook, "trunk") == [None, None]
    for message in ranks.run(without_the_hook, "heads"):
        assert "shared_rep_hook" in message


def on_two_dimensions(rank):
    net = make_net(trunk=trunk)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    fsdp.fully_shard(net, mesh=mesh)
    try:
        wrap(net)
    except BayesAggError as error:
        message = str(error)
    optimizer = wrap(net, process_group=torch.distributed.group.WORLD)
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        optimizer.zero_grad()
        optimizer.step(make_losses(net(x), labels))
    return message, gathered(net, optimizer.engine)


def test_a_mesh_of_two_dimensions_needs_a_group(ranks):
    """It does not say which ranks see data of their own."""
    both = ranks.run(on_two_dimensions)
    assert all("process_group" in message for message, _ in both)
    one = make_net(trunk=trunk)
    assert_equal_runs(run(one, one, wrap(one), 8), [found for _, found in both])


def refusing(rank):
    net = sharded("trunk")
    optimizer = wrap(net, "sgd", pretrain_epochs=0)
    names = []
    for index in range(4):
        x, labels = batch_of(index, half(rank))
        losses = make_losses(net(x), labels)
        if index == 1 and rank == 1:
            losses["cls"] = losses["cls"] * torch.inf
        if index == 2 and rank == 0:  # absent: every rank still reduces its gradient
            del losses["bin"]
        optimizer.zero_grad()
        try:
            optimizer.step(losses)
        except BayesAggError as error:
            names.append(type(error).__name__)
    return names, gathered(net, optimizer.engine)


def test_errors_and_absent_tasks_leave_no_rank_waiting(ranks):
    """Weights are gathered by all ranks or none."""
    (zero, first), (one, second) = ranks.run(refusing)
    assert (zero, one) == (["RankError"], ["LossError"])
    assert_same(first["parameters"], second["parameters"])
    assert_same(first["engine"], second["engine"], ignore=["task_weights"])

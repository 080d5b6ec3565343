"""``torch.distributed.checkpoint``: saved and loaded by one process, by two ranks, and across."""

from __future__ import annotations

import pytest
import torch

from bayesagg import BayesAggWrapper, RegressionHead
from bayesagg.checkpoint import PosteriorState
from bayesagg.errors import CheckpointError
from tests.helpers import (
    OPTIMIZERS,
    PaperBayesAgg,
    assert_same,
    make_batch,
    make_heads,
    make_losses,
    make_net,
    snapshot,
    train,
    wrap,
)
from tests.loops.test_distributed import assert_equal_runs, batch_of, half, run, trunk

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's checkpoints, about themselves
NOISE = {"reg": {"noise_variance": "learned"}}


def parts(net, owner, base):
    """What a checkpoint holds, by parameter name."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(net, base)
    return {"model": model, "optimizer": optimizer, "bayesagg": PosteriorState(owner)}


def save(net, owner, base, folder):
    import torch.distributed.checkpoint as dcp

    dcp.save(parts(net, owner, base), checkpoint_id=folder)


def load(net, owner, base, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = parts(net, owner, base)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(net, base, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@pytest.mark.parametrize("base", ["momentum", "adam"])
@pytest.mark.parametrize("stop", [0, 2, 3, 4, 7])
def test_a_loaded_run_goes_on_in_the_same_bits(stop, base, tmp_path):
    """From pre-training, from an epoch's end and from within an epoch, into a fresh start."""
    net = make_net()
    optimizer = wrap(net, base, settings=NOISE)
    train(net, optimizer, stop)
    save(net, optimizer, optimizer.base_optimizer, tmp_path)
    train(net, optimizer, range(stop, 10))
    other = make_net(seed=5)
    resumed = wrap(other, base, settings=NOISE)
    load(other, resumed, resumed.base_optimizer, tmp_path)
    train(other, resumed, range(stop, 10))
    assert_same(snapshot(net, optimizer), snapshot(other, resumed))


def test_the_engine_alone(tmp_path):
    def go_on(net, engine, optimizer, steps):
        for index in steps:
            x, labels = make_batch(seed=index)
            optimizer.zero_grad()
            engine.backward(make_losses(net(x), labels))
            optimizer.step()
            if index % 3 == 2:
                engine.end_epoch()

    runs = []
    for seed in (0, 5):
        net = make_net(seed=seed)
        runs.append(
            (net, PaperBayesAgg(net.trunk, make_heads(net)), OPTIMIZERS["adam"](net.parameters()))
        )
    go_on(*runs[0], range(5))
    save(*runs[0], tmp_path)
    load(*runs[1], tmp_path)
    for one in runs:
        go_on(*one, range(5, 10))
    assert_same(snapshot(*runs[0][:2]), snapshot(*runs[1][:2]))


def test_other_heads_are_refused(tmp_path):
    """With the error of any checkpoint; the posterior is unchanged."""
    net = make_net()
    optimizer = wrap(net)
    train(net, optimizer, 4)
    save(net, optimizer, optimizer.base_optimizer, tmp_path)
    other = make_net()
    base = OPTIMIZERS["adam"](other.parameters())
    heads = {"age": RegressionHead(other.heads["reg"])}
    resumed = BayesAggWrapper(base, other.trunk, heads)
    before = resumed.engine.get_extra_state()
    with pytest.raises(CheckpointError, match=r"other heads.*'reg'.*'age'"):
        load(other, resumed, base, tmp_path)
    assert_same(before, resumed.engine.get_extra_state())


def test_a_wrapper_taken_apart_is_refused():
    """The posterior would be lost without a word; the message says what to save."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = make_net()
    optimizer = wrap(net)
    train(net, optimizer, 4)
    model, state = get_state_dict(net, optimizer)
    with pytest.raises(CheckpointError, match="PosteriorState"):
        set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)


# --- two ranks -----------------------------------------------------------------------------------


def prepared(rank, seed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = make_net(trunk=trunk, seed=seed)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net.trunk, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, wrap(net, "adam", settings=NOISE)


def steps(rank, net, optimizer, indices):
    for index in indices:
        x, labels = batch_of(index, half(rank))
        optimizer.zero_grad()
        optimizer.step(make_losses(net(x), labels))


def found(net, optimizer):
    return {
        "parameters": {name: p.full_tensor().detach() for name, p in net.named_parameters()},
        "engine": optimizer.engine.get_extra_state(),
        "weights": dict(optimizer.task_weights),
    }


def saving(rank, folder):
    net, optimizer = prepared(rank, 0)
    steps(rank, net, optimizer, range(4))
    save(net, optimizer, optimizer.base_optimizer, folder)
    steps(rank, net, optimizer, range(4, 8))
    return found(net, optimizer)


def loading(rank, folder):
    net, optimizer = prepared(rank, 5)
    load(net, optimizer, optimizer.base_optimizer, folder)
    steps(rank, net, optimizer, range(4, 8))
    return found(net, optimizer)


@pytest.mark.skipif(
    not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"),
    reason="FSDP2 needs torch 2.6 or newer",
)
def test_sharded_ranks_resume_together_and_one_process_alone(ranks, tmp_path):
    """Two ranks in the same bits; one process from what two have saved, to rounding."""
    saved = ranks.run(saving, str(tmp_path))
    resumed = ranks.run(loading, str(tmp_path))
    for one, other in zip(saved, resumed, strict=True):
        assert_same(one, other)
    net = make_net(trunk=trunk, seed=5)
    optimizer = wrap(net, "adam", settings=NOISE)
    load(net, optimizer, optimizer.base_optimizer, str(tmp_path))
    for index in range(4, 8):
        x, labels = batch_of(index)
        optimizer.zero_grad()
        optimizer.step(make_losses(net(x), labels))
    alone = {
        "parameters": {name: p.detach() for name, p in net.named_parameters()},
        "engine": optimizer.engine.get_extra_state(),
        "weights": dict(optimizer.task_weights),
    }
    assert_equal_runs(alone, saved)
    whole = make_net(trunk=trunk)
    assert_equal_runs(run(whole, whole, wrap(whole, "adam", settings=NOISE), 8), saved)
    assert torch.isfinite(whole.heads["reg"].weight).all()

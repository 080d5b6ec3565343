"""``torch.distributed.checkpoint``: saved and loaded by one process, by two ranks, and across."""

import pytest
import torch

from bayesagg import BayesAggWrapper, RegressionHead
from bayesagg.checkpoint import PosteriorState
from bayesagg.errors import CheckpointError
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import OPTIMIZERS
from tests.helpers.states import assert_near, assert_same, snapshot
from tests.helpers.training import train, wrap
from tests.loops.runs import assert_equal_runs, result, steps, trained

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


@pytest.mark.parametrize("owner", ["wrapper", "engine"])
@pytest.mark.parametrize(
    ("base", "stop"), [*(("adam", stop) for stop in (0, 2, 3, 4)), ("momentum", 7)]
)
def test_a_loaded_run_goes_on_in_the_same_bits(stop, base, owner, rule, tmp_path):
    """From linear scalarization, from an epoch's end and from within one, into a fresh start."""

    def owner_of(wrapper):
        return wrapper if owner == "wrapper" else wrapper.engine

    net = make_net()
    optimizer = wrap(net, base, rule, settings=NOISE)
    train(net, optimizer, stop)
    save(net, owner_of(optimizer), optimizer.base_optimizer, tmp_path)
    train(net, optimizer, range(stop, 10))
    other = make_net(seed=5)
    resumed = wrap(other, base, rule, settings=NOISE)
    load(other, owner_of(resumed), resumed.base_optimizer, tmp_path)
    train(other, resumed, range(stop, 10))
    assert_same(snapshot(net, optimizer), snapshot(other, resumed))


def test_other_heads_are_refused(rule, tmp_path):
    """With the error of any checkpoint; the posterior is unchanged."""
    net = make_net()
    optimizer = wrap(net, "adam", rule)
    train(net, optimizer, 4)
    save(net, optimizer, optimizer.base_optimizer, tmp_path)
    other = make_net()
    base = OPTIMIZERS["adam"](other.parameters())
    heads = {"age": RegressionHead(other.heads["reg"])}
    resumed = BayesAggWrapper(base, other.trunk, heads, rule=rule)
    before = resumed.engine.get_extra_state()
    with pytest.raises(CheckpointError, match=r"other heads.*'reg'.*'age'"):
        load(other, resumed, base, tmp_path)
    assert_same(before, resumed.engine.get_extra_state())


def test_a_wrapper_taken_apart_is_refused(rule):
    """The posterior would be lost without a word; the message says what to save."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    net = make_net()
    optimizer = wrap(net, "adam", rule)
    train(net, optimizer, 4)
    model, state = get_state_dict(net, optimizer)
    with pytest.raises(CheckpointError, match="PosteriorState"):
        set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=state)


def prepared(rule, seed):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = plain_net(seed=seed)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net.trunk, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, wrap(net, "adam", rule, settings=NOISE)


def saving(rank, rule, folder):
    net, optimizer = prepared(rule, 0)
    steps(net, optimizer, range(4), rank)
    save(net, optimizer, optimizer.base_optimizer, folder)
    steps(net, optimizer, range(4, 8), rank)
    return result(net, optimizer)


def loading(rank, rule, folder):
    net, optimizer = prepared(rule, 5)
    load(net, optimizer, optimizer.base_optimizer, folder)
    steps(net, optimizer, range(4, 8), rank)
    return result(net, optimizer)


@pytest.mark.skipif(
    not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"),
    reason="FSDP2 needs torch 2.6 or newer",
)
def test_sharded_ranks_resume_together_and_one_process_alone(rule, ranks, tmp_path):
    """Two ranks, and one process from what two have saved, to rounding.

    What is known of losses is saved of the first rank alone: the second goes on with the first
    one's factors, which were read off other data.
    """
    saved = ranks.run(saving, rule, str(tmp_path))
    resumed = ranks.run(loading, rule, str(tmp_path))
    for one, other in zip(saved, resumed, strict=True):
        for end in (one, other):
            del end["engine"]["reader"]
        assert_near(one, other, tolerance=1e-12)
    net = plain_net(seed=5)
    optimizer = wrap(net, "adam", rule, settings=NOISE)
    load(net, optimizer, optimizer.base_optimizer, str(tmp_path))
    steps(net, optimizer, range(4, 8))
    whole = result(net, optimizer)
    for one in (whole, trained(None, rule, base="adam", settings=NOISE)):
        assert_equal_runs(one, saved, rule)
    assert torch.isfinite(whole["parameters"]["heads.reg.weight"]).all()

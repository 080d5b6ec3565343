"""Two ranks with half the batch each take the step of one process, and have its posterior."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from bayesagg import BayesAgg, LikelihoodRule, LossTask
from bayesagg.errors import BayesAggError, RankError
from tests.helpers.data import losses_over, make_losses, without
from tests.helpers.nets import plain_net
from tests.helpers.settings import GRADIENT, OUTPUTS, READOUT, SAMPLED
from tests.helpers.states import difference, gradients, snapshot
from tests.helpers.training import train, wrap
from tests.loops.runs import (
    ROWS,
    assert_equal_ranks,
    assert_equal_runs,
    assert_halves_are_the_whole,
    batch_of,
    half,
    result,
    steps,
    trained,
)

EXPONENTS = {"reg": {"s": 0.85}, "bin": {"s": 0.3}, "cls": {"s": 1.0}}
BOTH = {
    "default": {},
    "gradient_readout": {"settings": GRADIENT},
    "posterior_readout": {"settings": READOUT},
    "learned_noise": {"settings": {"reg": {"noise_variance": "learned"}}},
    "large_labels": {"unit": 0.01, "base": "adam"},
    "fixed_noise": {"settings": {"reg": {"noise_variance": 0.5}}},
}
OWN = {
    "likelihood": {
        "at_once": {"warmup": 0},
        "on_trial": {"warmup": 10, "indices": range(9)},
        "as_long_as_it_comes": {"keep_length": False},
        "towers": {"towers": True},  # the paper's rule needs one shared representation
    },
    "paper": {
        "exponents": {"settings": EXPONENTS},
        "monte_carlo": {"settings": SAMPLED},
        "full": {"covariance": "full"},
        "at_once": {"pretrain_epochs": 0},
    },
}
CASES = [(rule, name, case) for rule in OWN for name, case in {**BOTH, **OWN[rule]}.items()]
CASES = [pytest.param(rule, case, id=f"{rule}-{name}") for rule, name, case in CASES]


@pytest.mark.parametrize(("rule", "case"), CASES)
def test_two_halves_are_the_whole(rule, case, ranks):
    """In the steps of linear scalarization and after them, through an end of an epoch or two."""
    assert_halves_are_the_whole(ranks, rule, DistributedDataParallel, **case)


def sharded_states(rank, rule, sharded):
    """Parameters after some steps, whose states one rank has, or all."""
    net = plain_net()
    model, settings = DistributedDataParallel(net), {"lr": 1e-2}
    if sharded:
        base = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, **settings)
    else:
        base = torch.optim.Adam(net.parameters(), **settings)
    optimizer = wrap(net, base, rule)
    for index in range(7):
        x, labels = batch_of(index, half(rank))
        optimizer.zero_grad()
        optimizer.step(make_losses(model(x), labels))
    return snapshot(net)["parameters"]


def test_states_that_are_sharded_are_those_of_one(rule, ranks):
    """Bit for bit."""
    for ours, theirs in zip(
        ranks.run(sharded_states, rule, True), ranks.run(sharded_states, rule, False), strict=True
    ):
        assert difference(ours, theirs) is None


# --- ranks whose batches differ ------------------------------------------------------------------


def still(rank, rule, split=ROWS, missing=(), absent=(), given=True):
    """Steps at rate zero: the evidence alone tells runs apart, and the heads that it sets.

    Rank 0 has the first ``split`` rows and all tasks, rank 1 the other rows and not the tasks in
    ``absent``, ``None`` all rows. Labels of the tasks in ``missing`` end with row 8, and are
    ``given`` or read off the losses.
    """
    net = plain_net()
    model = net if rank is None else DistributedDataParallel(net)
    rows = {None: slice(0, ROWS), 0: slice(0, split), 1: slice(split, ROWS)}[rank]
    settings = {**READOUT, "reg": {**READOUT["reg"], "noise_variance": "learned"}}
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = wrap(net, base, rule, settings=settings)
    for index in range(7):
        x, labels = batch_of(index, rows)
        for name in missing:
            labels = without(labels, name, torch.arange(rows.start, rows.stop) >= 8)
        left_out = absent if rank == 1 else ()
        losses = {n: v for n, v in losses_over(model(x), labels).items() if n not in left_out}
        optimizer.zero_grad()
        optimizer.step(losses, targets={n: labels[n] for n in missing} if given else None)
    return result(net, optimizer)


# Lengths of gradients are those of the ranks' own means, as are the gradients that DDP averages.
LENGTH = {"ignore": ["length"]}


@pytest.mark.parametrize("split", [1, 8, 11])
def test_uneven_batches_are_one_batch(split, rule, ranks):
    assert_equal_runs(still(None, rule), ranks.run(still, rule, split), rule, **LENGTH)


# Rank 1 has some labels of these tasks, or none at all; they are read off the losses, or given.
@pytest.mark.parametrize(
    ("missing", "split", "given"),
    [
        *(([name], 6, name == "bin") for name in OUTPUTS),
        *((list(OUTPUTS), split, given) for split in (6, 8) for given in (False, True)),
    ],
)
def test_missing_labels_are_missing_in_the_whole(split, missing, given, rule, ranks):
    """Also where one rank has a matrix for every task and the other one for all."""
    both = ranks.run(still, rule, split, missing, given=given)
    assert_equal_runs(still(None, rule, ROWS, missing, given=given), both, rule, **LENGTH)


@pytest.mark.parametrize("task", ["reg", "bin", "cls"])
def test_a_task_that_is_absent_on_one_rank(task, rule, ranks):
    """Every rank takes the same part in all that is summed, whatever its losses are."""
    both = ranks.run(still, rule, 8, (), (task,))
    assert_equal_runs(still(None, rule, ROWS, [task]), both, rule, **LENGTH)


def absent_step(rank, rule, everywhere):
    """Gradients of two steps in which a task is absent on rank 1, or on both; and its own."""
    net, lone, found = plain_net(), plain_net(), []
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "sgd", rule, settings=GRADIENT)
    x, labels = batch_of(0, half(rank))
    for _ in range(2):
        losses = make_losses(model(x), labels)
        if rank == 1 or everywhere:
            del losses["bin"]
        optimizer.zero_grad()
        optimizer.backward(losses)
        found.append(gradients(net))
    make_losses(lone(x), labels)["bin"].backward()
    return found, lone.heads["bin"].weight.grad


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_head_of_an_absent_task_has_the_mean_gradient(everywhere, rule, ranks):
    """Half that of the rank that has it: what DistributedDataParallel makes of it."""
    (first, own), (second, _) = ranks.run(absent_step, rule, everywhere)
    expected = own * 0 if everywhere else own / 2
    for found in (*first, *second):
        torch.testing.assert_close(found["heads.bin.weight"], expected)
    assert difference(first[1], second[1]) is None


# --- errors --------------------------------------------------------------------------------------


BAD = {
    "loss": lambda losses: {**losses, "reg": losses["reg"] * torch.nan},
    "task": lambda losses: {**losses, "other": losses["reg"]},
    "detached": lambda losses: {name: loss.detach() for name, loss in losses.items()},
}


def refusing(rank, rule, kind, first):
    """Rank 1 has a bad batch in step ``first``; what each rank saw, and where both ended."""
    net = plain_net()
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "momentum", rule)
    steps(model, optimizer, range(first), rank)
    x, labels = batch_of(first, half(rank))
    losses = make_losses(model(x), labels)
    if rank == 1:
        losses = BAD[kind](losses)
    optimizer.zero_grad()
    before, error = snapshot(net, optimizer), None
    try:
        optimizer.step(losses)
    except Exception as caught:
        error = (type(caught).__name__, str(caught), isinstance(caught, RankError))
    changed = difference(before, snapshot(net, optimizer))
    steps(model, optimizer, range(first + 1, first + 5), rank)
    return error, changed, result(net, optimizer)


# At once, in linear scalarization and after it.
@pytest.mark.parametrize(
    ("kind", "first"), [("loss", 0), ("loss", 2), *((kind, 4) for kind in BAD)]
)
def test_a_bad_batch_on_one_rank_is_an_error_on_all(kind, first, rule, ranks):
    """No rank is left waiting, none changes in a bit, and training can go on."""
    (zero, *left), (one, *right) = ranks.run(refusing, rule, kind, first)
    assert zero[0] == "RankError" and "rank 1 refused its batch" in zero[1]
    assert one[0] == ("UnknownTaskError" if kind == "task" else "LossError") and not one[2]
    assert left[0] is right[0] is None
    others = [index for index in range(first + 5) if index != first]
    assert_equal_runs(trained(None, rule, indices=others), [left[1], right[1]], rule)


def overflowing(rank, rule):
    """The gradient at a head's output overflows on rank 1 only, under a scaler, in one step."""
    net = plain_net(dtype=torch.float32)
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "sgd", rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scales, changed = [], None
    for index in range(7):
        x, labels = batch_of(index, half(rank))
        out = model(x.float())
        labels = {name: y.float() if name != "cls" else y for name, y in labels.items()}
        if index == 4 and rank == 1:
            out["reg"].register_hook(lambda g: g * torch.inf)
        optimizer.zero_grad()
        before = snapshot(net, optimizer)
        scaler.scale(optimizer.loss(make_losses(out, labels))).backward()
        scaler.step(optimizer)
        scaler.update()
        if index == 4:
            before["gradients"] = (after := snapshot(net, optimizer))["gradients"]
            changed = difference(before, after)
        scales.append(scaler.get_scale())
    return scales, changed, result(net, optimizer)


def test_an_overflow_on_one_rank_skips_the_step_on_all(rule, ranks):
    """And teaches none of them anything."""
    first, second = ranks.run(overflowing, rule)
    assert first[0] == second[0] == [4.0] * 4 + [2.0] * 3
    assert first[1] is second[1] is None
    assert_equal_ranks([first[2], second[2]])


# --- which ranks ---------------------------------------------------------------------------------


def on_their_own(rank, rule):
    """A model of its own on every rank; the number of steps differs too."""
    found = []
    for group in ("auto", None):
        net = plain_net(seed=rank)
        optimizer = wrap(net, "momentum", rule, process_group=group)
        train(net, optimizer, 4 + rank)
        found.append(snapshot(net, optimizer))
    return difference(*found)


def test_ranks_with_models_of_their_own_are_left_alone(rule, ranks):
    assert ranks.run(on_their_own, rule) == [None, None]


def without_heads(rank, group):
    """One step of a loss without a head, of another value on every rank."""
    engine = BayesAgg(
        None, {"only": LossTask()}, rule=LikelihoodRule(warmup=0), process_group=group
    )
    free = torch.ones((), requires_grad=True)
    try:
        engine({"only": (1 + rank) * free}).backward()
    except BayesAggError as error:
        return str(error)
    return engine.get_extra_state()["memory"]["others"]["only"], free.grad


def test_ranks_without_any_head_have_to_be_told(ranks):
    """The default rule's, which alone takes no head."""
    for said in ranks.run(without_heads, "auto"):
        assert "pass `process_group=" in said
    (one, first), (other, second) = ranks.run(without_heads, None)
    assert not torch.equal(one, other)
    (one, first), (other, second) = ranks.run(with_world)
    assert torch.equal(one, other)
    assert torch.equal(2 * first, second)  # both over the mean of both losses


def with_world(rank):
    return without_heads(rank, dist.group.WORLD)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, one a rank, with nccl")
def test_two_halves_are_the_whole_under_nccl(rule, tmp_path):  # pragma: no cover
    torch.multiprocessing.spawn(_nccl, (rule, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal_runs(trained(None, rule), both, rule)


def _nccl(rank, rule, folder):  # pragma: no cover
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=2)
    net = plain_net("cuda")
    model = DistributedDataParallel(net, device_ids=[rank])
    optimizer = wrap(net, "momentum", rule)
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        labels = {name: y.cuda() for name, y in labels.items()}
        optimizer.zero_grad()
        optimizer.step(make_losses(model(x.cuda()), labels))
    move = torch.utils._pytree.tree_map
    found = move(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, result(net, optimizer))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

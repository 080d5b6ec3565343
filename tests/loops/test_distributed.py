"""Two ranks with half the batch each take the step of one process, and have its posterior."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bayesagg.distributed import bytes_per_step
from bayesagg.errors import LossError, RankError
from tests.helpers import (
    INPUTS,
    OPTIMIZERS,
    SAMPLED,
    WIDTH,
    PaperBayesAgg,
    assert_same,
    make_batch,
    make_heads,
    make_losses,
    make_net,
    wrap,
)

ROWS = 12
EPOCH = 3
READOUT = {name: {"readout": "posterior"} for name in ("reg", "bin", "cls")}
EXPONENTS = {"reg": {"s": 0.85}, "bin": {"s": 0.3}, "cls": {"s": 1.0}}
SETTINGS = {
    "default": {},
    "exponents": EXPONENTS,
    "learned_noise": {"reg": {"noise_variance": "learned"}},
    "monte_carlo": SAMPLED,
    "posterior_readout": READOUT,
}


def trunk():
    """Without batch normalisation, whose statistics would be those of half a batch."""
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh())


def batch_of(index, rows=slice(None)):
    x, labels = make_batch(seed=index, size=ROWS)
    return x[rows], {name: y[rows] for name, y in labels.items()}


def half(rank):
    return slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)


def result(net, optimizer, inputs=None):
    """What has to agree."""
    return {
        "parameters": {name: p.detach().clone() for name, p in net.named_parameters()},
        "engine": optimizer.engine.get_extra_state(),
        "weights": dict(optimizer.task_weights),
    }


def run(net, model, optimizer, steps, rows=lambda index: slice(None), tasks=lambda index: None):
    for index in range(steps):
        x, labels = batch_of(index, rows(index))
        losses = make_losses(model(x), labels)
        kept = tasks(index)
        optimizer.zero_grad()
        optimizer.step({name: losses[name] for name in kept or losses})
    return result(net, optimizer)


def alone(settings, base="momentum", steps=8, **kwargs):
    net = make_net(trunk=trunk)
    return run(net, net, wrap(net, base, settings=settings, **kwargs), steps)


def together(rank, settings, base="momentum", steps=8, kwargs=None):
    net = make_net(trunk=trunk)
    model = DistributedDataParallel(net)
    optimizer = wrap(net, base, settings=settings, **(kwargs or {}))
    return run(net, model, optimizer, steps, rows=lambda index: half(rank))


def assert_equal_runs(one, ranks, weights=True):
    """Ranks agree in every bit, and with the single process to rounding."""
    assert_same(ranks[0]["parameters"], ranks[1]["parameters"])
    assert_same(ranks[0]["engine"], ranks[1]["engine"], ignore=["task_weights"])
    tolerance = {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(ranks[0]["parameters"], one["parameters"], **tolerance)
    blocks = [run["engine"]["blocks"] for run in (ranks[0], one)]
    torch.testing.assert_close(*blocks, **tolerance)
    if weights:  # over the data of all ranks
        mean = {n: (w + ranks[1]["weights"][n]) / 2 for n, w in ranks[0]["weights"].items()}
        torch.testing.assert_close(mean, one["weights"], **tolerance)


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("kwargs", [{}, {"covariance": "full"}, {"rule": "likelihood"}], ids=str)
def test_two_halves_are_the_whole(kwargs, settings, ranks):
    """Over pre-training and two epochs after it."""
    both = ranks.run(together, SETTINGS[settings], "momentum", 8, kwargs)
    assert both[0]["engine"]["epoch"] == 2
    # The weights of the likelihood rule are shares of each rank's own.
    assert_equal_runs(alone(SETTINGS[settings], **kwargs), both, weights="rule" not in kwargs)


def test_the_ranks_do_not_agree_without_the_exchange(ranks):
    """What the tests above would miss otherwise."""
    both = ranks.run(together, {}, "momentum", 8, {"process_group": None})
    with pytest.raises(AssertionError):
        assert_equal_runs(alone({}), both)


# --- ranks whose batches differ ------------------------------------------------------------------


def still(net, model, rows, missing=(), absent=(), steps=5, **kwargs):
    """Steps at rate zero: the evidence alone tells runs apart, and the heads that it sets."""
    settings = {**SETTINGS["posterior_readout"], "reg": {"noise_variance": "learned"}}
    base = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = wrap(net, base, settings=settings, steps_per_epoch=2, **kwargs)
    for index in range(steps):
        x, labels = batch_of(index, rows)
        out = model(x)
        losses, targets = make_losses(out, labels), {}
        for name in missing:
            first = rows.start or 0
            known = torch.arange(first, first + len(x)) < 8  # labels of the others are missing
            y = labels[name]
            gap = torch.full_like(y, -100 if name == "cls" else torch.nan)
            targets[name] = torch.where(known.view(-1, *[1] * (y.dim() - 1)), y, gap)
        optimizer.zero_grad()
        optimizer.step(
            {name: loss for name, loss in losses.items() if name not in absent},
            targets={name: y for name, y in targets.items() if name not in absent},
        )
    return result(net, optimizer)


def still_rank(rank, splits, missing=(), absent=((), ())):
    net = make_net(trunk=trunk)
    model = DistributedDataParallel(net)
    rows = slice(0, splits) if rank == 0 else slice(splits, ROWS)
    return still(net, model, rows, missing, absent[rank])


def still_alone(missing=()):
    net = make_net(trunk=trunk)
    return still(net, net, slice(None), missing)


@pytest.mark.parametrize("rows", [1, 8, 11])
def test_uneven_batches_are_one_batch(rows, ranks):
    assert_equal_runs(still_alone(), ranks.run(still_rank, rows), weights=False)


@pytest.mark.parametrize("missing", [["reg"], ["bin"], ["cls"], ["reg", "bin", "cls"]])
@pytest.mark.parametrize("rows", [6, 8], ids=["on_one_rank_some", "on_one_rank_all"])
def test_missing_labels_are_missing_in_the_whole(rows, missing, ranks):
    """Also where one rank has a matrix for every task and the other one for all."""
    both = ranks.run(still_rank, rows, missing)
    assert_equal_runs(still_alone(missing), both, weights=False)


@pytest.mark.parametrize("task", ["reg", "bin", "cls"])
def test_a_task_that_is_absent_on_one_rank(task, ranks):
    """Every rank takes the same part in all that is summed, whatever its losses are."""
    both = ranks.run(still_rank, 8, (), ((), (task,)))
    assert_equal_runs(still_alone([task]), both, weights=False)


def absent_step(rank, everywhere):
    net = make_net(trunk=trunk)
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "sgd", settings={"reg": {"readout": "gradient"}}, pretrain_epochs=9)
    lone = make_net(trunk=trunk)
    gradients = []
    for _ in range(2):
        out = model(batch_of(0, half(rank))[0])
        losses = make_losses(out, batch_of(0, half(rank))[1])
        if rank == 1 or everywhere:
            del losses["bin"]
        optimizer.zero_grad()
        optimizer.backward(losses)
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    losses = make_losses(lone(batch_of(0, half(0))[0]), batch_of(0, half(0))[1])
    losses["bin"].backward()
    return gradients, lone.heads["bin"].weight.grad


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_head_of_an_absent_task_has_the_mean_gradient(everywhere, ranks):
    """Half that of the rank that has it: what DistributedDataParallel makes of it."""
    both = ranks.run(absent_step, everywhere)
    for gradients, own in both:
        for gradient in gradients:
            expected = own * 0 if everywhere else both[0][1] / 2
            torch.testing.assert_close(gradient["heads.bin.weight"], expected)
    assert_same(both[0][0][1], both[1][0][1])


# --- errors --------------------------------------------------------------------------------------


def refusing(rank, kind, pretrain):
    """Rank 1 has a bad batch in the third step; what each rank saw, and where both ended."""
    net = make_net(trunk=trunk)
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "momentum", pretrain_epochs=pretrain)
    seen = None
    for index in range(6):
        x, labels = batch_of(index, half(rank))
        losses = make_losses(model(x), labels)
        if index == 2 and rank == 1:
            if kind == "loss":
                losses["reg"] = losses["reg"] * torch.nan
            elif kind == "task":
                losses["other"] = losses["reg"]
            else:
                losses = {name: loss.detach() for name, loss in losses.items()}
        optimizer.zero_grad()
        try:
            optimizer.step(losses)
        except Exception as error:
            assert seen is None
            seen = (index, type(error).__name__, str(error), isinstance(error, RankError))
    return seen, result(net, optimizer)


@pytest.mark.parametrize("pretrain", [0, 1, 5])
@pytest.mark.parametrize("kind", ["loss", "task", "detached"])
def test_a_bad_batch_on_one_rank_is_an_error_on_all(kind, pretrain, ranks):
    """No rank is left waiting, none takes the step, and training can go on."""
    (zero, one), (first, second) = zip(*ranks.run(refusing, kind, pretrain), strict=True)
    assert zero[:2] == (2, "RankError")
    assert "rank 1 refused its batch" in zero[2]
    assert one[:2] == (2, {"task": "UnknownTaskError"}.get(kind, LossError.__name__))
    assert_same(first["parameters"], second["parameters"])
    assert_same(first["engine"], second["engine"], ignore=["task_weights"])
    assert first["engine"]["draws"] == 5


def overflowing(rank):
    """The gradient at a head's output overflows on rank 1 only, under a scaler."""
    net = make_net(trunk=trunk, dtype=torch.float32)
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "sgd", pretrain_epochs=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scales = []
    for index in range(4):
        x, labels = batch_of(index, half(rank))
        out = model(x.float())
        labels = {name: y.float() if name != "cls" else y for name, y in labels.items()}
        if index == 1 and rank == 1:
            out["reg"].register_hook(lambda g: g * torch.inf)
        losses = make_losses(out, labels)
        optimizer.zero_grad()
        optimizer.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return (
        scales,
        optimizer.engine._batches + optimizer.engine.epoch * EPOCH,
        result(net, optimizer),
    )


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    first, second = ranks.run(overflowing)
    assert first[0] == second[0] == [4.0, 2.0, 2.0, 2.0]
    assert first[1] == second[1] == 3
    assert_same(first[2]["parameters"], second[2]["parameters"])
    assert_same(first[2]["engine"], second[2]["engine"], ignore=["task_weights"])


# --- traffic -------------------------------------------------------------------------------------


def counted(rank, settings, dtype, missing):
    """Bytes of every all-reduce of the library, by step, and what it says of itself."""
    sent = []
    plain = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent[-1].append(tensor.numel() * tensor.element_size())
        return plain(tensor, *args, **kwargs)

    net = make_net(trunk=trunk)
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "sgd", settings=settings, dtype=dtype)
    said = []
    dist.all_reduce = all_reduce
    try:
        for index in range(5):
            x, labels = batch_of(index, half(rank))
            losses = make_losses(model(x), labels)
            targets = {}
            if missing and rank == 1 and index == 3:
                y = labels["reg"].clone()
                y[0, 0] = torch.nan
                targets = {"reg": y}
            sent.append([])
            optimizer.step(losses, targets=targets)
            said.append(bytes_per_step(optimizer.engine))
    finally:
        dist.all_reduce = plain
    return sent, said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_exchange_a_step_of_the_stated_size(dtype, ranks):
    """Formula of ``bytes_per_step``, by hand: one block each, ``M = 5`` (classes: 10)."""
    numbers = 3 + 3 + (15 + 2 * (5 + 1)) + (2 * 15 + 2 * (5 + 1)) + (55 + 10 + 1)
    for sent, said in ranks.run(counted, {}, dtype, False):
        assert sent == [[numbers * dtype.itemsize]] * 5
        assert said == [numbers * dtype.itemsize] * 5


def test_learned_noise_takes_a_small_exchange_more(ranks):
    numbers = 3 + 3 + (15 + 2 * (5 + 1 + 2)) + (2 * 15 + 2 * (5 + 1)) + (55 + 10 + 1)
    settings = SETTINGS["learned_noise"]
    for sent, said in ranks.run(counted, settings, torch.float64, False):
        assert sent == [[numbers * 8]] * 3 + [[numbers * 8, 2 * 8]] * 2
        assert said == [numbers * 8 + 2 * 8] * 5


def test_missing_labels_take_a_matrix_for_every_task(ranks):
    """The first time an exchange more, which tells every rank so."""
    few = 8 * (3 + 3 + (15 + 2 * (5 + 1)) + (2 * 15 + 2 * (5 + 1)) + (55 + 10 + 1))
    many = few + 8 * 15
    for sent, said in ranks.run(counted, {}, torch.float64, True):
        assert sent == [[few]] * 3 + [[few, many], [many]]
        assert said == [few] * 3 + [many] * 2


# --- which ranks ---------------------------------------------------------------------------------


def on_their_own(rank):
    """A model of its own on every rank; the number of steps differs too."""
    net = make_net(trunk=trunk, seed=rank)
    return run(net, net, wrap(net, "momentum"), 4 + rank)


def test_ranks_with_models_of_their_own_are_left_alone(ranks):
    for rank, found in enumerate(ranks.run(on_their_own)):
        net = make_net(trunk=trunk, seed=rank)
        assert_same(run(net, net, wrap(net, "momentum"), 4 + rank), found)


def by_hand(rank):
    """The engine alone; gradients averaged by the user."""
    net = make_net(trunk=trunk)
    engine = PaperBayesAgg(net.trunk, make_heads(net), process_group=dist.group.WORLD)
    optimizer = OPTIMIZERS["momentum"](net.parameters())
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        optimizer.zero_grad()
        engine.backward(make_losses(net(x), labels))
        for p in net.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= 2
        optimizer.step()
        if index % EPOCH == EPOCH - 1:
            engine.end_epoch()
    return {
        "parameters": {name: p.detach().clone() for name, p in net.named_parameters()},
        "engine": engine.get_extra_state(),
        "weights": dict(engine.task_weights),
    }


def test_a_group_may_be_given(ranks):
    assert_equal_runs(alone({}), ranks.run(by_hand))


def test_a_word_is_no_group():
    net = make_net(trunk=trunk)
    with pytest.raises(ValueError, match="process_group must be"):
        wrap(net, process_group="nccl")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, one a rank, with nccl")
def test_two_halves_are_the_whole_under_nccl(tmp_path):  # pragma: no cover
    torch.multiprocessing.spawn(_nccl, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal_runs(alone({}), both)


def _nccl(rank, folder):  # pragma: no cover
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=2)
    net = make_net("cuda", trunk=trunk)
    model = DistributedDataParallel(net, device_ids=[rank])
    optimizer = wrap(net, "momentum")
    for index in range(8):
        x, labels = batch_of(index, half(rank))
        labels = {name: y.cuda() for name, y in labels.items()}
        optimizer.zero_grad()
        optimizer.step(make_losses(model(x.cuda()), labels))
    found = result(net, optimizer)
    move = torch.utils._pytree.tree_map
    found = move(lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, found)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

"""The default rule finds out how many data there are, and has none in its evidence twice.

The paper's rule has epochs, or a memory of its own. In the bias of a head's evidence, whose feature
is 1, stands the number of data that it is from.
"""

import pytest
import torch
from torch import nn

from bayesagg import BayesAggWrapper, LikelihoodRule, RegressionHead
from bayesagg.errors import CheckpointError
from tests.loops.runs import half

INPUTS, WIDTH = 3, 3  # four weights an output: a memory of 80 data
LENGTH = 20 * (WIDTH + 1)


class Towers(nn.Module):
    """Regressions on one tensor, or one each on two."""

    def __init__(self, outputs=2, apart=False):
        super().__init__()
        self.trunks = nn.ModuleList(nn.Linear(INPUTS, WIDTH) for _ in range(1 + apart))
        self.a, self.b = nn.Linear(WIDTH, outputs), nn.Linear(WIDTH, 1)

    def forward(self, x):
        h = [trunk(x) for trunk in self.trunks]
        return {"a": self.a(h[0]), "b": self.b(h[-1])}


def start(rule=None, dtype=torch.float32, lr=0.0, **kwargs):
    torch.manual_seed(0)
    net = Towers(**kwargs).to(dtype)
    heads = {"a": RegressionHead(net.a), "b": RegressionHead(net.b)}
    base = torch.optim.SGD(net.parameters(), lr=lr)
    return net, BayesAggWrapper(base, None, heads, rule=rule or LikelihoodRule())


def draw(size, seed=0, outputs=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": INPUTS, "a": outputs, "b": 1}
    return {n: torch.randn(size, w, generator=generator).to(dtype) for n, w in shapes.items()}


def rows_of(size, batch, data, seed=0, replacement=False):
    """Rows of every step: epochs, each in an order of its own, or at random; so many data."""
    generator = torch.Generator().manual_seed(seed)
    epochs = range(-(-data // size))
    if replacement:
        orders = (torch.randint(size, (size,), generator=generator) for _ in epochs)
    else:
        orders = (torch.randperm(size, generator=generator) for _ in epochs)
    steps = [rows for order in orders for rows in order.split(batch)]
    return steps[: -(-data // batch)]


def keep(y, name):
    return y


def run(net, optimizer, data, rows, *, change=keep, targets=False, tasks="ab"):
    for some in rows:
        out = net(data["x"][some])
        labels = {name: change(data[name][some], name) for name in tasks}
        losses = {n: (out[n] - y)[~y.isnan()].square().mean() for n, y in labels.items()}
        optimizer.zero_grad()
        optimizer.step(losses, targets=labels if targets else None)


def counts(optimizer):
    """Data in the evidence of every unit, by task."""
    units = optimizer.engine._memory.units
    return {name: unit.gram[:, -1, -1] for unit in units for name in unit.names}


def assert_counts(optimizer, expected, slack=0.15):
    for name, found in counts(optimizer).items():
        low, high = (1 - slack) * expected, (1 + slack) * expected
        assert bool(((found > low) & (found < high)).all()), (name, found)


def steady(length, batch):
    """What evidence comes to that fades over ``length`` data."""
    return batch / (1 - torch.tensor(-batch / length).exp().item())


def ratings(y, name):
    return y.sign()


def noise(y, name):
    return y + 0.01 * torch.randn_like(y)


# By name: data, batch, how many are expected in the evidence, tolerance, the memory if it is
# given, and a change of the labels. Two marks, of a batch of two, tell that only roughly.
CASES = {
    "20 in sevens": (20, 7, 20, 0.2, None, keep),
    "all at once": (20, 20, 20, 0.2, None, keep),
    "38 in twos": (38, 2, 38, 0.4, None, keep),
    "38 in eights": (38, 8, 38, 0.2, None, keep),
    "60 in tens": (60, 10, 60, 0.2, None, keep),
    "a few more than the memory": (100, 20, LENGTH, 0.05, None, keep),
    "many": (1000, 20, LENGTH, 0.05, None, keep),
    # Nothing would show that labels do not tell data apart.
    "one a step": (38, 1, LENGTH, 0.05, None, keep),
    "labels that are ratings": (30, 20, LENGTH, 0.05, None, ratings),
    "labels with noise": (30, 20, LENGTH, 0.05, None, noise),
    "a memory that is given": (30, 20, 300, 0.01, 300, keep),
}


@pytest.mark.parametrize("name", CASES)
def test_no_datum_is_in_the_evidence_more_than_once(name):
    """And where there are more than the memory is long, nobody looks for repeats any more."""
    size, batch, expected, slack, memory, change = CASES[name]
    net, optimizer = start(LikelihoodRule(memory=memory))
    run(net, optimizer, draw(size), rows_of(size, batch, 8 * (memory or LENGTH)), change=change)
    assert_counts(optimizer, steady(expected, batch), slack)
    for unit in optimizer.engine._memory.units:
        assert (unit.repeats is None) == (memory is not None)
        if name in ("a few more than the memory", "many"):
            assert not unit.repeats.counting


def test_data_that_are_drawn_at_random():
    """Marks come again at random, too: the four of a batch tell roughly, and without a bias."""
    found = []
    for seed in range(4):
        net, optimizer = start()
        rows = rows_of(60, 4, 6 * LENGTH, seed=seed, replacement=True)
        run(net, optimizer, draw(60), rows)
        found.append(counts(optimizer)["a"].item())
    assert sum(found) / len(found) == pytest.approx(steady(60, 4), rel=0.2)


@pytest.mark.parametrize("targets", [False, True], ids=["recovered", "targets"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_unit_of_the_labels_has_no_say(dtype, scale, targets):
    net, optimizer = start(dtype=dtype)
    data = draw(30, dtype=dtype)
    data["a"] = data["a"] * scale + 10 * scale
    run(net, optimizer, data, rows_of(30, 10, 6 * LENGTH), targets=targets)
    assert_counts(optimizer, steady(30, 10))


SHARED = 6 * LENGTH


def many_with_few_values(rank, batch, width):
    """Data in the evidence from many data, of each task apart, whose labels are round numbers."""
    net, optimizer = start(outputs=1, apart=True)
    model = net if rank is None else nn.parallel.DistributedDataParallel(net)
    data = draw(SHARED, outputs=1)
    data["a"], data["b"] = (width * data["a"]).round(), (width * data["b"]).round()
    rows = rows_of(SHARED, batch, SHARED)
    run(model, optimizer, data, rows if rank is None else (r[rank::2] for r in rows))
    return counts(optimizer)


@pytest.mark.parametrize("width", [0.7, 10.0], ids=["ratings", "ages"])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_data_that_share_labels_are_not_the_same(batch, width):
    """Those of a small batch may all be different, and come again with other data."""
    for found in many_with_few_values(None, batch, width).values():
        assert found.item() == pytest.approx(steady(LENGTH, batch), rel=0.1)


def test_data_that_share_labels_on_several_ranks(ranks):
    """One datum a rank: they are compared with each other."""
    for found in ranks.run(many_with_few_values, 2, 1.0):
        for one in found.values():
            assert one.item() == pytest.approx(steady(LENGTH, 2), rel=0.1)


def test_a_datum_may_be_in_a_step_twice():
    """Its features are the same, so it is one."""
    net, optimizer = start()
    first, *others = rows_of(30, 10, 6 * LENGTH)
    run(net, optimizer, draw(30), [first, *(rows.repeat(2) for rows in others)])
    assert_counts(optimizer, steady(30, 20))


def test_every_output_with_gaps_counts_its_own():
    """Of its labels: the first output has a half, the second all."""
    net, optimizer = start()
    data = draw(80)
    data["a"][::2, 0] = torch.nan
    data["b"][::4] = torch.nan
    run(net, optimizer, data, rows_of(80, 20, 10 * LENGTH), targets=True)
    found = {name: value.tolist() for name, value in counts(optimizer).items()}
    assert found["a"] == pytest.approx([steady(40, 10), steady(80, 20)], rel=0.3)
    assert found["b"] == pytest.approx([steady(60, 15)], rel=0.3)


def test_tasks_have_data_sets_of_their_own():
    """Steps of one and the other in turns, of few and of many data."""
    net, optimizer = start(apart=True)
    few, many = draw(40, seed=1), draw(5000, seed=2)
    pairs = zip(rows_of(40, 10, 6 * LENGTH), rows_of(5000, 10, 6 * LENGTH), strict=False)
    for one, other in pairs:
        run(net, optimizer, few, [one], tasks="a")
        run(net, optimizer, many, [other], tasks="b")
    found = counts(optimizer)
    assert found["a"].item() == pytest.approx(steady(40, 10), rel=0.15)
    assert found["b"].item() == pytest.approx(steady(LENGTH, 10), rel=0.01)


def test_a_data_set_may_grow():
    """As in active learning: a window later the memory is as long as it may be."""
    net, optimizer = start()
    data = draw(3000)
    run(net, optimizer, data, rows_of(40, 10, 6 * LENGTH))
    assert_counts(optimizer, steady(40, 10))
    run(net, optimizer, data, rows_of(3000, 10, 8 * LENGTH))
    assert_counts(optimizer, steady(LENGTH, 10), 0.02)


def counted(rank, size):
    """Data in the evidence after some epochs, each dealt out to the ranks."""
    net, optimizer = start()
    model = net if rank is None else nn.parallel.DistributedDataParallel(net)
    run(model, optimizer, draw(size), (rows[half(rank)] for rows in rows_of(size, 12, 400)))
    return counts(optimizer)


def test_ranks_count_together(ranks):
    """A datum comes again on any rank."""
    expected = counted(None, 36)
    assert expected["a"].item() == pytest.approx(steady(36, 12), rel=0.15)
    for found in ranks.run(counted, 36):
        assert found == expected


def test_the_count_resumes_in_the_same_bits():
    whole, kept = start(lr=1e-3), start(lr=1e-3)
    data, rows = draw(30), list(rows_of(30, 10, 6 * LENGTH))
    run(*whole, data, rows)
    run(*kept, data, rows[:31])
    net, optimizer = start(lr=1e-3)
    net.load_state_dict(kept[0].state_dict())
    optimizer.load_state_dict(kept[1].state_dict())
    run(net, optimizer, data, rows[31:])
    for one, other in zip(net.parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("saved", [None, 100], ids=["counted", "given"])
def test_a_checkpoint_of_the_other_memory_is_refused(saved):
    net, optimizer = start(LikelihoodRule(memory=saved))
    run(net, optimizer, draw(30), rows_of(30, 10, 60))
    _, other = start(LikelihoodRule(memory=None if saved else 100))
    with pytest.raises(CheckpointError, match="`memory` of the rule"):
        other.load_state_dict(optimizer.state_dict())

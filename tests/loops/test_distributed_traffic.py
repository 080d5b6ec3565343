"""What ranks exchange in a step: how many numbers, in how many all-reduces."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.data import losses_over, without
from tests.helpers.nets import plain_net
from tests.helpers.training import wrap
from tests.loops.runs import batch_of, half


def counted(rank, rule, kwargs, missing):
    """Numbers in every all-reduce of the library, by step; bytes that it says it has sent."""
    sent = []
    plain = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent[-1].append((tensor.numel(), tensor.element_size()))
        return plain(tensor, *args, **kwargs)

    net = plain_net()
    model = DistributedDataParallel(net)
    optimizer = wrap(net, "sgd", rule, **kwargs)
    said = []
    dist.all_reduce = all_reduce
    try:
        for index in range(6):
            x, labels = batch_of(index, half(rank))
            if missing and rank == 1 and index == 4:
                labels = without(labels, "reg", torch.arange(len(x)) == 0)
            losses = losses_over(model(x), labels)
            sent.append([])
            optimizer.step(losses, targets={"reg": labels["reg"]} if missing else None)
            said.append(optimizer.engine._exchange.sent)
    finally:
        dist.all_reduce = plain
    return sent, said


# Votes: refusals, the rank that refused, overflows, and what a rule asks of each of three heads.
VOTES = {"likelihood": 3 + 3 * 3, "paper": 3 + 3 * 2}
# By hand, with 4 + 1 weights an output. The default rule: one Gram matrix, seven columns, the
# losses of three classifications, the number of data, three numbers for each of 128 marks; then
# squared residuals and labels of two regressions, and two lengths. The paper's: halves of matrices,
# vectors and counts by kind.
SUMS = {
    "likelihood": [25 + 7 * 5 + 3 + 1 + 3 * 128, 2 * 2 + 2],
    "paper": [(15 + 2 * (5 + 1)) + (2 * 15 + 2 * (5 + 1)) + (55 + 10 + 1)],
}
# Of labels that are missing: five matrices, columns as before, losses and counts of all outputs; a
# matrix for the second regression. Two regressions make marks of their own at first.
GAPS = {
    "likelihood": [5 * 25 + 7 * 5 + 5 + 5 + 2 + 2 * 128, 2 * 2 + 2],
    "paper": [SUMS["paper"][0] + 15],
}
AFTER = {
    "likelihood": [GAPS["likelihood"][0] - 2 * 128 + 2 * 3 * 128, 2 * 2 + 2],
    "paper": SUMS["paper"],
}


def said_of(rule, sums, size=8):
    """All-reduces of a step: numbers, and bytes of each."""
    return [(VOTES[rule], 4), *((n, size) for n in sums)]


LEARNED = {"settings": {"reg": {"noise_variance": "learned"}}}
SQUARES = SUMS["paper"][0] + 4  # of residuals and labels


# Arguments of the wrapper, and all-reduces of the first three steps and of those after them.
@pytest.mark.parametrize(
    ("rule", "kwargs", "first", "later"),
    [
        *((rule, {"dtype": torch.float64}, sums, sums) for rule, sums in SUMS.items()),
        *((rule, {"dtype": torch.float32}, sums, sums) for rule, sums in SUMS.items()),
        ("paper", LEARNED, [SQUARES], [SQUARES, 4]),  # as the default rule always has it
    ],
)
def test_the_exchange_is_of_the_stated_size(rule, kwargs, first, later, ranks):
    """While data are counted; the default rule's first step has the scales of its batch."""
    size = kwargs.get("dtype", torch.float64).itemsize
    expected = [said_of(rule, first, size)] * 3 + [said_of(rule, later, size)] * 3
    start = 1 if rule == "likelihood" else 0
    for sent, said in ranks.run(counted, rule, kwargs, False):
        assert sent[start:] == expected[start:]
        assert said[start:] == [sum(n * size for n, size in step) for step in expected[start:]]


def test_missing_labels_take_a_matrix_for_every_task(rule, ranks):
    """On both ranks, whichever has them; the default rule keeps heads apart from then on."""
    for sent, said in ranks.run(counted, rule, {}, True):
        assert sent[3] == said_of(rule, SUMS[rule])
        assert sent[4] == said_of(rule, GAPS[rule])
        assert sent[5] == said_of(rule, AFTER[rule])
        assert said[4] == sum(n * size for n, size in sent[4])

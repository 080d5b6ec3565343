"""Runs that are compared: networks without batch statistics, batches for ranks, and their ends."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn

from bayesagg import BayesAgg, BayesAggWrapper
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import Net, plain_net
from tests.helpers.states import assert_near, assert_same
from tests.helpers.training import wrap
from tests.loops.ranks import Ranks

ROWS = 12


def batch_of(index: int, rows: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
    """Some rows of batch number ``index``."""
    x, labels = make_batch(seed=index, size=ROWS)
    return x[rows], {name: y[rows] for name, y in labels.items()}


def half(rank: int | None) -> slice:
    """The rows of one of two ranks; all of them of ``None``."""
    return slice(None) if rank is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)


def result(net: nn.Module, owner: BayesAgg | BayesAggWrapper) -> dict[str, Any]:
    """What has to agree; parameters whole, also where they are sharded."""
    engine = owner if isinstance(owner, BayesAgg) else owner.engine
    return {
        "parameters": {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in net.named_parameters()
        },
        "engine": engine.get_extra_state(),
        "weights": {name: weight.clone() for name, weight in engine.task_weights.items()},
    }


def steps(
    model: nn.Module,
    optimizer: BayesAggWrapper,
    indices: Iterable[int],
    rank: int | None = None,
    unit: float = 1.0,
) -> None:
    """Training steps over this rank's half of the batches; ``unit``: of the regression's labels."""
    for index in indices:
        x, labels = batch_of(index, half(rank))
        labels["reg"] = labels["reg"] / unit
        losses = make_losses(model(x), labels)
        optimizer.zero_grad()
        optimizer.step(losses)


def trained(
    rank: int | None,
    rule: str,
    model_of: Callable[[Net], nn.Module] = nn.Identity,
    *,
    base: str = "momentum",
    indices: Iterable[int] = range(8),
    towers: bool = False,
    unit: float = 1.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """The end of a run: this rank's, under ``model_of``, or that of one process with all data."""
    net = plain_net(towers=towers)
    model = net if rank is None else model_of(net)
    optimizer = wrap(net, base, rule, **kwargs)
    steps(model, optimizer, indices, rank, unit)
    return result(net, optimizer)


def assert_equal_ranks(ranks: list[dict[str, Any]]) -> None:
    """In every bit, but for the weights, which are those of each rank's data, and its losses."""
    assert_same(ranks[0]["parameters"], ranks[1]["parameters"])
    assert_same(ranks[0]["engine"], ranks[1]["engine"], ignore=["task_weights", "reader"])


def assert_equal_runs(
    one: dict[str, Any], ranks: list[dict[str, Any]], rule: str, *, ignore: Collection[str] = ()
) -> None:
    """Ranks agree in every bit, and with the single process to rounding.

    Weights under the paper's rule are means over data, and those of the whole are means of the
    ranks'; those of the default rule are shares of each rank's own sum. ``ignore``: entries of the
    memory; with any, ranks are not halves, and weights are not compared.
    """
    assert_equal_ranks(ranks)
    for run in (one, ranks[0]):
        run["memory"] = {k: v for k, v in run["engine"]["memory"].items() if k not in ignore}
    for part in ("parameters", "memory"):
        assert_near(ranks[0][part], one[part], part)
    if rule == "paper" and not ignore:
        mean = {n: (w + ranks[1]["weights"][n]) / 2 for n, w in ranks[0]["weights"].items()}
        assert_near(mean, one["weights"], "weights")
    for run in (one, *ranks):
        total = sum(float(weight.sum()) for weight in run["weights"].values())
        assert total == 0 or abs(total - 1) < 1e-6, total  # zero of a rank without labels


def assert_halves_are_the_whole(ranks: Ranks, rule: str, model_of: Any, **kwargs: Any) -> None:
    """Of a run of :func:`trained`."""
    both = ranks.run(trained, rule, model_of, **kwargs)
    assert_equal_runs(trained(None, rule, **kwargs), both, rule)

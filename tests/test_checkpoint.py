"""Checkpoints that are damaged in any leaf, or of another run, are refused with nothing changed.

The damage is generated from the states themselves, so that a leaf that is added is tested too.
What is saved and loaded well is tested in ``test_optimizer_state.py`` and ``loops``.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BinaryHead, LossTask, MulticlassHead, RegressionHead
from bayesagg.checkpoint import PosteriorState
from bayesagg.errors import CheckpointError
from tests.helpers.data import losses_over, make_batch, without
from tests.helpers.nets import make_net, plain_net, plain_trunk
from tests.helpers.settings import EPOCH, OPTIMIZERS, SAMPLED, WIDTH
from tests.helpers.states import difference, snapshot
from tests.helpers.training import make_heads, train, wrap

WIDE = 130  # outputs of more weights keep a basis of their evidence for some steps
# Entries that no run makes negative, by name.
NOT_NEGATIVE = {
    *("rows", "labels", "factor", "scale", "length", "values", "left", "steps", "batches", "epoch"),
    *("draws", "count", "seen", "task_weights", "lr", "exp_avg_sq", "max_exp_avg_sq", "step"),
    *("weight_decay", "eps"),
}
# What a good state may look like too: units, scales and forms are of losses that were seen, there
# is no evidence at the start of an epoch, and tasks may have a precision each or one for all.
GOOD = {
    *(("units", "shorter"), ("others", "removed"), ("reader", "removed"), ("basis", "none")),
    *(("full", "none"), ("running", "none"), ("precision", "an entry more")),
    *((name, size) for name in ("forms", "reductions", "factor") for size in ("shorter", "longer")),
}
NUMBERS = int | float
OURS = {"bayesagg"}  # the part of a wrapper's state that is not its base's
LOOK = 20  # damages between two looks at what has changed, which takes as long as loading


def build(case, rule, base, seed=0):
    """Network, wrapper, and a function that takes a training step."""
    wide = {
        "outputs": {"reg": 2, "bin": 2},
        "width": WIDE,
        "trunk": lambda: plain_trunk(width=WIDE),
    }
    net = make_net(seed=seed, **(wide if case == "wide" else {}))
    heads = make_heads(net, rule, **SAMPLED)
    if case == "other_losses":
        heads["aux"] = LossTask()
    optimizer = wrap(net, base, rule, heads=heads)

    def step(index):
        outputs = {n: m.out_features for n, m in net.heads.items()}
        x, labels = make_batch(seed=index, outputs=outputs)
        if case == "missing":
            for name in labels:
                labels = without(labels, name, torch.arange(len(x)) % 3 == 0)
        losses = losses_over(net(x), labels)
        if case == "other_losses":
            losses["aux"] = F.softplus(net.trunk(x)).mean()
        optimizer.zero_grad()
        optimizer.step(losses, targets=labels if case == "missing" else None)

    return net, optimizer, step


@functools.cache
def trained(case, rule, base):
    """A run, one step into an epoch."""
    net, optimizer, step = build(case, rule, base)
    for index in range(EPOCH + 1):
        step(index)
    return net, optimizer, step


def nodes(value, path=()):
    """Paths of all containers and leaves, with their values."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, part in value.items():
            yield from nodes(part, (*path, key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from nodes(part, (*path, index))


def damages(path, value, of_base):
    """Names of damages and what they make of a value; the value itself is not touched."""
    names = {key for key in path if isinstance(key, str)}
    if value is not None:
        yield "none", None
    yield "text", "damaged"
    yield "another container", {} if isinstance(value, list | tuple) else [value]
    if isinstance(value, dict) and not of_base:
        yield "an extra key", {**value, "extra": 1}
        yield "an extra number", {**value, 99: torch.ones(2)}
    if isinstance(value, list | tuple) and value:
        yield "shorter", value[:-1]
        yield "longer", [*value, value[-1]]
    if isinstance(value, bool):
        yield "a number", 1
        yield "a tensor", torch.tensor([value, value])
    elif isinstance(value, NUMBERS):
        yield "NaN", float("nan")
        yield "infinite", float("inf")
        yield "a boolean", True
        yield "a tensor of two", torch.ones(2)
        if names & NOT_NEGATIVE and value >= 0:
            yield "negative", -1 - value
        if isinstance(value, int) and not of_base:
            yield "a fraction", value + 0.5
    elif isinstance(value, torch.Tensor):
        yield "a dimension more", value[None].repeat_interleave(2, 0)
        if value.dim():
            yield "an entry more", torch.cat([value, value[:1]])
            yield "flattened", torch.cat([value.flatten(), value.flatten()[:1]])
        yield "a number", 1.0
        yield "complex", value.to(torch.complex128)
        if value.is_floating_point():
            first = torch.tensor([0], device=value.device)
            for name, wrong in (("NaN", torch.nan), ("infinite", -torch.inf)):
                yield name, value.clone().index_fill_(0, first, wrong)
            if not of_base:
                yield "integers", value.long()
            if "gram" in names or (names & NOT_NEGATIVE and bool((value >= 0).all())):
                yield "negative", -1 - value


def changed(state, path, *value):
    """A state with another value at one place, or without it; what is not on the way is shared."""
    made = dict(state) if isinstance(state, dict) else list(state)
    first, *rest = path
    if rest:
        made[first] = changed(state[first], rest, *value)
    elif value:
        [made[first]] = value
    else:
        del made[first]
    return tuple(made) if isinstance(state, tuple) else made


def damaged(state, parts):
    """Every damage of some parts of a wrapper's state, with its name."""
    for path, value in nodes(state):
        if path[0] not in parts:
            continue
        of_base = path[0] != "bayesagg"
        if path[0] == "state" and len(path) > 1 and path[1] > 1:
            continue  # that of all parameters is alike
        where = "/".join(map(str, path))
        for name, wrong in damages(path, value, of_base):
            if (path[-1], name) not in GOOD:
                yield f"{where}: {name}", changed(state, path, wrong)
        parent = functools.reduce(lambda part, key: part[key], path[:-1], state)
        # Parameters that never had a gradient have no state: their lack is no damage.
        optional = path[:-1] in ((), ("state",)) or (path[-2], "removed") in GOOD
        if isinstance(parent, dict) and not optional:
            yield f"{where}: removed", changed(state, path)


def assert_refuses(pristine, state, load, parts):
    """Every damage raises ``CheckpointError`` and changes nothing; lists those that do not."""
    (net, optimizer), found = copy.deepcopy(pristine), []
    before = snapshot(net, optimizer)
    every = list(damaged(state, parts))
    for number, (name, wrong) in enumerate(every, 1):
        outcome = change = None
        try:
            load(optimizer, wrong)
            outcome = "loaded"
        except CheckpointError:
            pass
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome is not None or number % LOOK == 0 or number == len(every):
            change = difference(before, snapshot(net, optimizer))
        if outcome is not None or change is not None:
            found.append(f"{name}: {outcome}; of the last {LOOK} changed {change}")
        if change is not None:
            net, optimizer = copy.deepcopy(pristine)
    assert len(every) > 50
    assert not found, f"{len(found)} damages:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("into", "base", "rule"),
    [
        ("itself", "adam", "likelihood"),
        ("fresh", "adamw", "paper"),
        ("fresh", "momentum", "likelihood"),
    ],
)
def test_every_damage_of_the_base_is_refused(into, base, rule):
    """Into the run it was saved from, and into one that has not begun; no rule has a say."""
    state = trained("mixture", rule, base)[1].state_dict()
    net, optimizer, step = build("mixture", rule, base, seed=into == "fresh")
    if into == "itself":
        optimizer.load_state_dict(copy.deepcopy(state))
    pristine = net, optimizer
    assert_refuses(pristine, state, lambda o, wrong: o.load_state_dict(wrong), state.keys() - OURS)
    optimizer.load_state_dict(state)  # which is good
    step(9)


@pytest.mark.parametrize("case", ["fresh", "mixture", "missing", "wide", "other_losses"])
def test_every_damage_of_an_engine_is_refused(case, rule):
    """As it is loaded with a training module; ``fresh``: into a run that has not begun."""
    net, optimizer, _ = trained("mixture" if case == "fresh" else case, rule, "adam")
    state = {"bayesagg": optimizer.engine.get_extra_state()}
    if case == "fresh":
        net, optimizer, _ = build("mixture", rule, "adam", seed=1)

    def load(optimizer, wrong):
        optimizer.engine.load_state_dict({"_extra_state": wrong["bayesagg"]})

    assert_refuses((net, optimizer), state, load, OURS)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_a_parameter_may_be_a_scalar(base, rule, device, dtype):
    """A temperature, whose mean gradient is a scalar too and has any sign."""
    net = plain_net(device, dtype)
    net.temperature = torch.nn.Parameter(torch.ones((), device=device, dtype=dtype))

    def step(optimizer, sign):
        optimizer.zero_grad()
        x, labels = make_batch(device, dtype)
        optimizer.loss(losses_over(net(x), labels)).backward()
        net.temperature.grad = torch.full_like(net.temperature, sign)
        optimizer.step()

    for sign in (1.0, -1.0):
        own = {"momentum": 0.9} if base is torch.optim.RMSprop else {}
        optimizer = wrap(net, base(net.parameters(), lr=1e-3, **own), rule)
        for _ in range(2):
            step(optimizer, sign)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
        (scalar,) = (s for p, s in optimizer.state.items() if p is net.temperature)
        for name in scalar.keys() & {"step", "exp_avg_sq", "square_avg"}:
            wrong = copy.deepcopy(state)
            for entries in wrong["state"].values():
                if torch.as_tensor(entries[name]).dim() == 0:
                    entries[name] = -1 - entries[name]
            refused(net, optimizer, optimizer.load_state_dict, wrong, "negative")


def refused(net, optimizer, load, state, match=None):
    """As damage is, with nothing changed."""
    before = snapshot(net, optimizer)
    with pytest.raises(CheckpointError, match=match):
        load(state)
    assert difference(before, snapshot(net, optimizer)) is None


REG, BIN, CLS = RegressionHead, BinaryHead, MulticlassHead


def linear(outputs, width=WIDTH, bias=True):
    return nn.Linear(width, outputs, bias)


# None has the tasks of `make_heads`: a regression and a binary head of two outputs, three classes.
OTHERS = {
    "names": {"other": REG(linear(2)), "bin": BIN(linear(2)), "cls": CLS(linear(3))},
    "fewer": {"reg": REG(linear(2)), "bin": BIN(linear(2))},
    "order": {"bin": BIN(linear(2)), "reg": REG(linear(2)), "cls": CLS(linear(3))},
    "kind": {"reg": BIN(linear(2)), "bin": BIN(linear(2)), "cls": CLS(linear(3))},
    "classes": {"reg": REG(linear(2)), "bin": BIN(linear(2)), "cls": CLS(linear(4))},
    "bias": {"reg": REG(linear(2, bias=False)), "bin": BIN(linear(2)), "cls": CLS(linear(3))},
    "width": {"reg": REG(linear(2, 3)), "bin": BIN(linear(2, 3)), "cls": CLS(linear(3, 3))},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_other_heads_is_refused(other, rule):
    net, optimizer, step = trained("mixture", rule, "adam")
    engine = BayesAgg(None, OTHERS[other], rule=rule)
    state = {**optimizer.state_dict(), "bayesagg": engine.get_extra_state()}
    says = "other heads.*same heads, in the same order"
    refused(net, optimizer, optimizer.load_state_dict, state, says)
    step(9)


def test_a_state_of_other_moments_is_refused():
    """Under the paper's rule, where heads that are computed together share a layout."""
    two = {"one": linear(2), "two": linear(2)}
    saved = BayesAgg(None, {name: BIN(module) for name, module in two.items()}, rule="paper")
    sampled = {"one": BIN(two["one"]), "two": BIN(two["two"], moments="monte_carlo")}
    with pytest.raises(CheckpointError, match="moments"):
        BayesAgg(None, sampled, rule="paper").set_extra_state(saved.get_extra_state())


def test_what_is_no_state_is_refused(rule):
    net, optimizer, _ = trained("mixture", rule, "adam")
    state = optimizer.state_dict()
    lacking = [{key: state[key] for key in state.keys() - {missing}} for missing in state]
    for wrong in (None, [], "text", 3, *lacking):
        refused(net, optimizer, optimizer.load_state_dict, wrong)
    for wrong in (None, {}, {"state": b"damaged"}, {"state": None}):  # of a distributed checkpoint
        refused(net, optimizer, PosteriorState(optimizer).load_state_dict, wrong)


def test_a_state_of_the_other_rule_is_refused(rule, net):
    other = {"paper": "likelihood", "likelihood": "paper"}[rule]
    optimizer = wrap(net, "adam", rule)
    state = trained("mixture", other, "adam")[1].state_dict()
    refused(net, optimizer, optimizer.load_state_dict, state, f"rule '{other}'.*'{rule}'")


def test_a_state_of_another_optimizer_is_refused(rule, net):
    optimizer = wrap(net, "adam", rule)
    state = trained("mixture", rule, "adam")[1].state_dict()
    momentum = OPTIMIZERS["momentum"](make_net().parameters()).state_dict()
    groups = torch.optim.Adam([{"params": [p]} for p in make_net().parameters()]).state_dict()
    plain = optimizer.base_optimizer.state_dict()
    for wrong, says in (
        ({**state, **momentum}, "Adam"),
        ({**state, **groups}, "parameter group"),
        (plain, r"plain optimizer.*base_optimizer\.load_state_dict"),
    ):
        refused(net, optimizer, optimizer.load_state_dict, wrong, says)
    train(net, optimizer, 1)

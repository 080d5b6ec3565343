"""Bad descriptions of heads and arguments of the wrapper: their own error, and what to do."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.errors import HeadError
from bayesagg.rules import PaperRule
from tests.helpers.settings import QUICK, RULES, WIDTH
from tests.helpers.states import assert_finite, assert_same, snapshot
from tests.helpers.training import make_heads, train, train_step, wrap

REG, BIN, CLS = RegressionHead, BinaryHead, MulticlassHead
LINEAR = nn.Linear(WIDTH, 2)
NAN, INF = torch.nan, torch.inf


def tower(*more):
    return nn.Sequential(nn.Linear(4, 2), *more)


# What is said, and the heads of which it is said.
HEADS = {
    ("RegressionHead needs", "linear"): [
        (REG, module, {})
        for module in (
            *(tower(nn.ReLU()), tower(tower(nn.ReLU())), nn.Sequential(), nn.ReLU(), "linear"),
            *(nn.Bilinear(4, 4, 2), nn.Embedding(4, 2), nn.ConvTranspose2d(4, 2, 1)),
        )
    ],
    ("RegressionHead needs a convolution of kernel size 1", "linear"): [
        (REG, nn.Conv2d(4, 2, 3), {}),
        (REG, nn.Conv2d(4, 2, (1, 3)), {}),
        (REG, nn.Conv2d(4, 2, 1, stride=2), {}),
        (REG, nn.Conv1d(4, 2, 1, groups=2), {}),
        (REG, nn.Conv3d(4, 2, 1, padding=1), {}),
    ],
    ("lazy", "one forward pass"): [(REG, nn.LazyLinear(2), {}), (REG, nn.LazyConv2d(2, 1), {})],
    ("s must be a finite number >= 0",): [
        (REG, LINEAR, {"s": s}) for s in (-0.1, NAN, INF, "0.5", True)
    ],
    ("prior_variance must be a finite number > 0",): [
        (CLS, LINEAR, {"prior_variance": value}) for value in (0, -1.0, INF)
    ],
    ("noise_variance must be",): [
        (REG, LINEAR, {"noise_variance": value}) for value in (0.0, -1, "x")
    ],
    ("num_samples must be an integer of at least 2",): [
        (BIN, LINEAR, {"num_samples": value}) for value in (1, 2.5, "8")
    ],
    ("BinaryHead: .* must be one of",): [
        (BIN, LINEAR, {"moments": "exact"}),
        (BIN, LINEAR, {"readout": "newton"}),
    ],
    ("at least two outputs", "use BinaryHead"): [(CLS, nn.Linear(WIDTH, 1), {})],
    ("readout='posterior'", "parametrization", "readout='gradient'"): [
        (REG, parametrizations.weight_norm(nn.Linear(WIDTH, 2)), {"readout": "posterior"})
    ],
}


def says(caught, patterns):
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), (pattern, str(caught.value))


@pytest.mark.parametrize(
    ("patterns", "kind", "module", "settings"),
    [(patterns, *head) for patterns, heads in HEADS.items() for head in heads],
)
def test_a_bad_head(patterns, kind, module, settings):
    with pytest.raises(HeadError) as caught:
        kind(module, **settings)
    assert type(caught.value) is HeadError
    says(caught, patterns)


def again(net, rule):
    return {"heads": {**make_heads(net, rule), "again": REG(net.heads["reg"])}}


def wider(net, rule):
    return {"heads": {**make_heads(net, rule), "other": REG(nn.Linear(WIDTH + 1, 2))}}


# The error, what it says, and arguments or what makes them of a network.
WRAPPERS = [
    (HeadError, ("heads 'reg' and 'again'", "own linear"), again),
    (
        HeadError,
        (r"heads\['reg'\] is a Linear", "wrap the module in RegressionHead"),
        lambda net, rule: {"heads": dict(net.heads)},
    ),
    *((HeadError, ("`heads` is empty", "pass a"), {"heads": heads}) for heads in ({}, [])),
    *(
        (ValueError, ("`shared_rep_hook` must be", "Pass the module"), {"shared_rep_hook": hook})
        for hook in ("trunk", 3)
    ),
    *(
        (ValueError, ("passthrough", "'aux'|'reg'"), {"passthrough": names})
        for names in ("aux", ("reg",))
    ),
    *(
        (ValueError, ("steps_per_epoch", r"len\(train_loader\)"), {"steps_per_epoch": value})
        for value in (0, -1, 2.5, True)
    ),
    *(
        (ValueError, (next(iter(options)), "must be"), options)
        for options in (
            *({"rule": rule} for rule in ("nash", PaperRule, 3)),
            *({"dtype": torch.float16}, {"process_group": "all"}),
        )
    ),
]
WRAPPERS = [
    *((rule, *case) for rule in RULES for case in WRAPPERS),
    ("paper", HeadError, ("and 'other'", "4 and 5 dimensions", "default"), wider),
]


@pytest.mark.parametrize(("rule", "error", "patterns", "options"), WRAPPERS)
def test_bad_arguments_of_a_wrapper(rule, error, patterns, options, net, batch):
    """The model and the wrapper that it has go on as if nothing had happened."""
    optimizer = wrap(net, "momentum", rule, settings=QUICK)
    train(net, optimizer, 4)
    before = snapshot(net, optimizer)
    given = {"heads": make_heads(net, rule), "rule": RULES[rule], "shared_rep_hook": net.trunk}
    given |= options(net, rule) if callable(options) else options
    with pytest.raises(error) as caught:
        BayesAggWrapper(optimizer.base_optimizer, **given)
    assert type(caught.value) is error
    says(caught, patterns)
    assert_same(before, snapshot(net, optimizer))
    train_step(net, optimizer, batch)
    assert_finite(snapshot(net, optimizer))


def test_an_optimizer_is_wrapped_and_once(rule, net):
    optimizer = wrap(net, "momentum", rule, settings=QUICK)
    before = snapshot(net, optimizer)
    for wrong in ("sgd", 3, None, optimizer):
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer.*not wrapped yet"):
            BayesAggWrapper(wrong, net.trunk, make_heads(net, rule))
    assert_same(before, snapshot(net, optimizer))

"""Descriptions of heads: what is accepted, what is read from a module and what is written to it."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bayesagg import BayesAgg, BinaryHead, LossTask, MulticlassHead, RegressionHead
from bayesagg.errors import BayesAggError, HeadError
from bayesagg.heads import named_heads
from bayesagg.predicting import Predictor

KINDS = [RegressionHead, BinaryHead, MulticlassHead]


class Mine(nn.Linear):
    """Subclasses of linear modules are linear."""


class Foreign(nn.Module):
    """A linear layer of another library, as PyG's."""

    def __init__(self, inputs, outputs, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


MODULES = {
    "linear": lambda bias: nn.Linear(4, 3, bias=bias),
    "linear_foreign": lambda bias: Foreign(4, 3, bias),
    "linear_subclass": lambda bias: Mine(4, 3, bias=bias),
    "conv1d": lambda bias: nn.Conv1d(4, 3, 1, bias=bias),
    "conv2d": lambda bias: nn.Conv2d(4, 3, 1, bias=bias, padding="valid"),
    "conv3d": lambda bias: nn.Conv3d(4, 3, 1, bias=bias, dilation=2),
}


@pytest.fixture(params=[True, False], ids=["bias", "no_bias"])
def bias(request):
    return request.param


@pytest.mark.parametrize("module", sorted(MODULES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_describes_its_module(kind, module, bias):
    linear = MODULES[module](bias)
    head = kind(linear)
    assert (head.in_features, head.out_features, head.has_bias) == (4, 3, bias)
    assert head.channels_first == ("conv" in module)
    assert head.num_tasks == (1 if kind is MulticlassHead else 3)
    assert head.linear is linear and head.module is linear
    assert len(head.parameters()) == 1 + bias


@pytest.mark.parametrize("module", sorted(MODULES))
def test_weights_are_read_and_written_with_the_bias_last(module, bias, device, dtype):
    """What is written is what the module then computes, in its own dtype and place."""
    linear = MODULES[module](bias).to(device=device, dtype=dtype)
    head = RegressionHead(linear)
    before = [p.data_ptr() for p in linear.parameters()]
    weights = torch.randn(3, 4 + bias, dtype=torch.float64, device=device)
    with torch.no_grad():
        head.write(weights)
    assert [p.data_ptr() for p in linear.parameters()] == before
    rounded = weights.to(dtype)
    torch.testing.assert_close(head.weights(), rounded[:, :4], rtol=0, atol=0)
    assert not head.weights().requires_grad
    x = torch.randn(2, 4, dtype=dtype, device=device)
    expected = x @ rounded[:, :4].mT + (rounded[:, -1] if bias else 0)
    shape = x if "linear" in module else x[(...,) + (None,) * int(module[4])]
    torch.testing.assert_close(linear(shape).flatten(1), expected)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrized_head_can_be_read(name):
    """And not written."""
    linear = getattr(parametrizations, name)(nn.Linear(4, 3))
    head = RegressionHead(linear)
    torch.testing.assert_close(head.weights(), linear.weight.detach())
    assert not head.writable


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_frozen_head_is_not_writable(part):
    linear = nn.Linear(4, 3)
    head = BinaryHead(linear)
    assert head.writable
    getattr(linear, part).requires_grad_(False)
    assert not head.writable


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_leaves_its_settings_to_the_rule(kind):
    settings = dataclasses.asdict(kind(nn.Linear(4, 3)))
    left = {"s", "prior_variance", "readout", "noise_variance", "moments", "num_samples"}
    assert all(settings[name] is None for name in left & settings.keys())


def test_the_head_of_a_tower_is_its_last_layer():
    last = nn.Linear(4, 3)
    for tower in (
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), last),
        nn.Sequential(nn.Linear(2, 4), nn.Sequential(nn.ReLU(), nn.Sequential(last))),
    ):
        head = MulticlassHead(tower)
        assert head.module is tower and head.linear is last and head.watched is last
        assert (head.in_features, head.out_features) == (4, 3)
        assert head.parameters() == [last.weight, last.bias]


def test_compiled_towers_and_layers_are_seen_through():
    last = nn.Linear(4, 3)
    compiled = torch.compile(last, backend="eager")
    head = RegressionHead(compiled)
    assert head.linear is last and head.watched is compiled
    tower = torch.compile(nn.Sequential(nn.ReLU(), last), backend="eager")
    assert RegressionHead(tower).linear is last and RegressionHead(tower).watched is last


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_keywords_and_fixed(kind):
    """A posterior that was computed under them does not change under its feet."""
    linear = nn.Linear(4, 3)
    with pytest.raises(TypeError):
        kind(linear, 0.5)
    head = kind(linear, s=1, prior_variance=2, readout="gradient")
    assert (head.s, head.prior_variance, head.readout) == (1, 2, "gradient")
    for setting, value in (("s", 2.0), ("prior_variance", 1.0), ("module", linear)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(head, setting, value)


@pytest.mark.parametrize(
    ("kinds", "others", "settings"),
    [
        *(([RegressionHead], KINDS[1:], {"noise_variance": v}) for v in (1, 0.5, "learned")),
        (KINDS[1:], [RegressionHead], {"moments": "monte_carlo"}),
        (KINDS[1:], [RegressionHead], {"num_samples": 8}),
    ],
)
def test_settings_of_other_kinds_are_refused(kinds, others, settings):
    linear = nn.Linear(4, 3)
    [(name, value)] = settings.items()
    assert all(getattr(kind(linear, **settings), name) == value for kind in kinds)
    for kind in others:
        with pytest.raises(TypeError, match=name):
            kind(linear, **settings)


def test_a_head_that_is_initialised_by_a_forward_pass():
    lazy = nn.LazyLinear(3)
    lazy(torch.zeros(2, 4))
    assert BinaryHead(lazy).in_features == 4


def test_names_and_order_are_kept():
    heads = {"b": RegressionHead(nn.Linear(4, 1)), "a": BinaryHead(nn.Linear(4, 2))}
    assert list(named_heads(heads)) == ["b", "a"]
    assert named_heads(heads) is not heads
    assert list(named_heads(list(heads.values()))) == ["0", "1"]
    assert named_heads(tuple(heads.values()))["1"] is heads["a"]
    heads["aux"] = LossTask()
    assert named_heads(heads)["aux"] is heads["aux"]


@pytest.mark.parametrize("around", [lambda layer: layer, lambda layer: nn.Sequential(layer)])
def test_one_module_under_two_descriptions_is_refused(around):
    """Also as the last layer of two towers."""
    layer = nn.Linear(4, 2)
    heads = {"a": RegressionHead(around(layer)), "b": BinaryHead(around(layer))}
    with pytest.raises(HeadError, match=r"'a' and 'b' share one module"):
        named_heads(heads)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_of_two_families(kind):
    """Caught as the library's or as Python's."""
    for family in (BayesAggError, ValueError):
        with pytest.raises(family):
            kind(nn.ReLU())


@pytest.mark.parametrize("rule", ["likelihood", "paper"])
def test_a_kind_without_an_entry_is_named(rule):
    """A head of one's own, of which a table says nothing yet."""

    class CountHead(RegressionHead):
        kind = "count"

    head = CountHead(nn.Linear(4, 1))
    with pytest.raises(HeadError, match=r"'visits'.*BOUNDS|'visits'.*likelihoods\.LIKELIHOODS"):
        BayesAgg(None, {"visits": head}, rule=rule)
    with pytest.raises(HeadError, match=r"'visits'.*prediction.*'count'"):
        Predictor(nn.Sequential(head.module), {"visits": head})

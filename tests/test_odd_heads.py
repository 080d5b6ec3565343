"""Linear layers that are more than ``W h + b``, or whose weights are not their own.

What is inferred of a head goes by its weight and bias. Where these do not say what it returns, or
where setting them would change another layer, an error says so before anything has changed.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from bayesagg import BayesAggWrapper, MulticlassHead, RegressionHead
from bayesagg.errors import HeadError
from bayesagg.heads import named_heads
from tests.helpers.settings import EPOCH, RULES
from tests.helpers.states import assert_finite, assert_same, snapshot


class Scaled(nn.Linear):
    """As in networks of equalised learning rates."""

    def forward(self, x):
        return F.linear(x, 0.5 * self.weight, self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return 5 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class LowRank(nn.Linear):
    """As in LoRA: what is learned is added to the weights."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_a = nn.Parameter(torch.randn(1, self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, 1))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_a.mT @ self.lora_b.mT


class Adapted(nn.Linear):
    """The same, in modules of its own; nothing is added before training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora = nn.Sequential(nn.Linear(self.in_features, 1), nn.Linear(1, self.out_features))
        nn.init.zeros_(self.lora[1].weight)
        nn.init.zeros_(self.lora[1].bias)

    def forward(self, x):
        return super().forward(x) + self.lora(x)


def double_input(head):
    return head.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def double_output(head):
    return head.register_forward_hook(lambda module, args, output: 2 * output)


def hooked(hook):
    head = nn.Linear(4, 2)
    hook(head)
    return head


def start(head, rule, steps=0):
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    net = nn.Sequential(trunk, head)
    base = torch.optim.Adam(net.parameters(), lr=0.01)
    optimizer = BayesAggWrapper(base, trunk, {"age": RegressionHead(head)}, rule=RULES[rule])
    step(net, optimizer, steps)
    return net, optimizer


def step(net, optimizer, count=1):
    for _ in range(count):
        x = torch.randn(8, 5)
        optimizer.zero_grad()
        optimizer.step({"age": F.mse_loss(net(x), x[:, :2])})


def refuses(net, optimizer, match, losses=None):
    """A step raises, and nothing has changed but that gradients were set to none."""
    before = snapshot(net, optimizer)
    with pytest.raises(HeadError, match=match):
        if losses is None:
            step(net, optimizer)
        else:
            optimizer.step(losses)
    assert_same(before, snapshot(net, optimizer), ignore=["gradients"] if losses is None else [])


MORE = [Scaled(4, 2), Cosine(4, 2), hooked(double_input), hooked(double_output)]


@pytest.mark.parametrize("head", MORE)
def test_a_head_that_does_more_is_refused(head, rule):
    refuses(*start(head, rule), r"task 'age'.*weight @ h \+ bias.*LossTask")


@pytest.mark.parametrize("how", ["added", "swapped", "resumed"])
def test_a_hook_that_comes_in_mid_training_is_seen(how, rule):
    """Also where all losses are known; one behind the head is part of its loss."""
    net, optimizer = start(nn.Linear(4, 2), rule)
    harmless = net[1].register_forward_pre_hook(lambda module, args: None)
    step(net, optimizer, EPOCH + 1)
    if how == "swapped":  # there are as many as before
        harmless.remove()
    double_input(net[1])
    if how == "resumed":
        optimizer.load_state_dict(optimizer.state_dict())
    refuses(net, optimizer, r"task 'age'.*weight @ h \+ bias")


def shorten(head):
    head.weight = nn.Parameter(head.weight[:1].detach().clone())
    head.bias = nn.Parameter(head.bias[:1].detach().clone())


def widen(head):
    head.weight = nn.Parameter(torch.cat([head.weight.detach(), torch.randn(2, 4)]))
    head.bias = nn.Parameter(torch.zeros(4))


def drop_bias(head):
    head.bias = None


@pytest.mark.parametrize("steps", [1, EPOCH + 1])
@pytest.mark.parametrize("change", [shorten, widen, drop_bias])
def test_a_head_that_was_changed_since_it_was_wrapped(change, steps, rule):
    net, optimizer = start(nn.Linear(4, 2), rule, steps)
    change(net[1])
    losses = {"age": net(torch.randn(8, 5)).square().mean()}
    refuses(net, optimizer, r"task 'age'.*2 outputs of 4 features.*anew", losses)


@pytest.mark.parametrize("change", ["others of the size", "a hook behind it"])
def test_a_head_may_change_in_training(change, rule):
    """Weights may start anew; what a hook does behind the engine's is part of the loss."""
    net, optimizer = start(nn.Linear(4, 2), rule, EPOCH + 1)
    if change == "others of the size":
        net[1].weight = nn.Parameter(torch.randn(2, 4))
    else:
        double_output(net[1])
    step(net, optimizer, EPOCH + 1)
    assert_finite(snapshot(net, optimizer))


@pytest.mark.parametrize("around", [lambda head: head, lambda head: nn.Sequential(head)])
@pytest.mark.parametrize(
    ("head", "match"),
    [(LowRank, "LowRank.*lora_a, lora_b"), (Adapted, r"Adapted.*lora\.0\.weight")],
)
def test_parameters_beside_weight_and_bias_are_refused(head, match, around):
    with pytest.raises(HeadError, match=f"{match}.*LossTask"):
        RegressionHead(around(head(4, 2)))


class Copies(nn.Module):
    """As PEFT keeps a head that trains beside the adapters."""

    def __init__(self, head):
        super().__init__()
        self.original_module, self.modules_to_save = head, nn.ModuleDict({"default": head})


class Adapter(nn.Module):
    """As PEFT's: a layer with the weights of the one inside it."""

    def __init__(self, head):
        super().__init__()
        self.base_layer = head

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)


@pytest.mark.parametrize(
    ("around", "match"),
    [(Copies, r"test_odd_heads\.Copies.*to_save\['default'\]"), (Adapter, r"not in `target_modul")],
)
def test_what_to_pass_of_an_adapted_head(around, match):
    with pytest.raises(HeadError, match=match):
        RegressionHead(around(nn.Linear(4, 2)))


def old(name):
    """Weights that a hook makes of other parameters."""
    head = nn.Linear(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        if name == "prune":
            return prune.l1_unstructured(head, "weight", 0.5)
        return getattr(nn.utils, name)(head)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "prune"])
def test_weights_that_a_hook_computes_are_left_to_the_optimizer(name, rule):
    """As those of a parametrization."""
    head = old(name)
    assert not RegressionHead(head).writable
    with pytest.raises(HeadError, match="parametrization"):
        RegressionHead(head, readout="posterior")
    net, optimizer = start(head, rule)
    for _ in range(EPOCH + 2):
        before = [parameter.clone() for parameter in head.parameters()]
        step(net, optimizer)
        assert all(parameter.grad is not None for parameter in head.parameters())
    rate = 0.01 * 1.5
    for one, other in zip(before, head.parameters(), strict=True):
        assert 0 < (one - other).abs().max().item() < rate


def test_heads_that_share_a_weight_are_refused():
    one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    other.weight = one.weight
    with pytest.raises(HeadError, match="'a' and 'b' share"):
        named_heads({"a": RegressionHead(one), "b": RegressionHead(other)})


class Words(nn.Module):
    """A model of language whose head is its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(6, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def losses(self):
        words = torch.arange(6).repeat(3)
        return {"next": F.cross_entropy(self.head(self.body(self.embedding(words))), words)}


def wrapped_words(rule, hooked=True, **settings):
    net = Words()
    base, hook = torch.optim.Adam(net.parameters(), lr=0.01), net.body if hooked else None
    heads = {"next": MulticlassHead(net.head, **settings)}
    return net, BayesAggWrapper(base, hook, heads, rule=RULES[rule])


@pytest.mark.parametrize("hooked", [False, True])
def test_a_head_that_is_an_embedding_is_refused(hooked, rule):
    """Its posterior mean would overwrite the embedding, and its gradient be dropped."""
    net, optimizer = wrapped_words(rule, hooked, readout="posterior")
    refuses(net, optimizer, r"task 'next'.*tied.*readout='gradient'", net.losses())


def test_an_embedding_that_keeps_its_gradient_may_be_a_head(rule):
    """As classifications do under the paper's rule."""
    net, optimizer = wrapped_words(rule, **({"likelihood": {"readout": "gradient"}}.get(rule, {})))
    first = net.losses()["next"].item()
    for _ in range(10 * EPOCH):
        optimizer.zero_grad()
        optimizer.step(net.losses())
        assert net.embedding.weight.grad.any()
    assert net.losses()["next"].item() < 0.8 * first

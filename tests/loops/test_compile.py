"""``torch.compile`` around trunk, heads, towers and losses, and of the mathematics itself."""

import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F

from bayesagg.aggregation import aggregate_diagonal
from bayesagg.errors import LossError
from bayesagg.moments import Spectrum, leave_one_out, regression_moments, student_gradient
from bayesagg.posterior import Gaussian
from tests.helpers.data import make_batch
from tests.helpers.nets import make_net, plain_net
from tests.helpers.settings import QUICK
from tests.helpers.training import train, wrap

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's, about parts of torch itself


@pytest.fixture(autouse=True)
def _fresh():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def trunk_function(net, **kwargs):
    net.trunk = torch.compile(net.trunk, **kwargs)


def all_functions(net, **kwargs):
    trunk_function(net, **kwargs)
    for name in list(net.heads):
        net.heads[name] = torch.compile(net.heads[name], **kwargs)


def all_methods(net, **kwargs):
    for module in (net.trunk, *net.heads.values()):
        module.compile(**kwargs)


def last_layers(net, **kwargs):
    """Of towers: what stands before the head is in no graph."""
    for tower in net.heads.values():
        tower[-1] = torch.compile(tower[-1], **kwargs)


# What wraps comes before the wrapper, which has to watch it; what changes a module may come later.
BEFORE = {f.__name__: f for f in (all_functions, trunk_function, last_layers)}
AFTER = {
    "all_methods": all_methods,
    "trunk_method": lambda net, **kwargs: net.trunk.compile(**kwargs),
    "whole_method": lambda net, **kwargs: net.compile(**kwargs),
}
BOTH = ("all_functions", "whole_method")


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def compare(rule, kind, device, dtype, towers=False, **kwargs):
    nets = [
        plain_net(device, dtype, towers=True) if towers else make_net(device, dtype)
        for _ in range(2)
    ]
    for net, compiled in zip(nets, (False, True), strict=True):
        if compiled and kind in BEFORE:
            BEFORE[kind](net, **kwargs)
        optimizer = wrap(net, "momentum", rule, settings=QUICK)
        if compiled and kind in AFTER:
            AFTER[kind](net, **kwargs)
        train(net, optimizer, 7)
    torch.testing.assert_close(*map(parameters, nets))


# What is compiled knows nothing of rules: two of the ways are tested under both. That of the paper
# has no towers, of which a graph breaks before the head.
@pytest.mark.parametrize(
    ("kind", "backend", "rule", "towers"),
    [
        *((kind, "eager", "likelihood", False) for kind in ["trunk_function", *AFTER]),
        *((kind, "aot_eager", rule, False) for kind in BOTH for rule in ("likelihood", "paper")),
        *((kind, "eager", "likelihood", True) for kind in ("all_methods", "last_layers")),
        *((kind, "aot_eager", "likelihood", True) for kind in BOTH),
    ],
)
def test_compiled_parts_train_alike(kind, backend, rule, towers, device, dtype):
    """In linear scalarization and after it, with heads that the posterior writes."""
    compare(rule, kind, device, dtype, towers, backend=backend)


@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend(device):
    """Inductor, for the trunk, in one graph: hooks are outside of it, as is any rule."""
    nets = [plain_net(device, torch.float32) for _ in range(2)]
    trunk_function(nets[0], fullgraph=True)
    for net in nets:
        train(net, wrap(net, "sgd", "likelihood"), 5)
    torch.testing.assert_close(*map(parameters, nets))


def test_parts_compile_without_a_break(rule, device, dtype):
    compare(rule, "all_functions", device, dtype, backend="eager", fullgraph=True)


@pytest.mark.parametrize("towers", [False, True], ids=["heads", "towers"])
def test_a_graph_without_breaks_around_a_head_is_refused(towers, rule, device, dtype):
    """The hooks would have no tensors to see; the message says what to compile."""
    net = plain_net(device, dtype, towers=towers and rule == "likelihood")
    optimizer = wrap(net, "adam", rule, settings=QUICK)
    model = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the shared network and each"):
        model(make_batch(device, dtype)[0])
    train(net, optimizer, 4)


@pytest.mark.parametrize("way", ["compiled", "exported", "exported by dynamo"])
def test_a_trained_network_is_one_graph(way, rule, device, dtype):
    """In evaluation mode, where nothing is noted; it trains on afterwards."""
    net = plain_net(device, dtype)
    optimizer = wrap(net, "adam", rule, settings=QUICK)
    train(net, optimizer, 5)
    x = make_batch(device, dtype)[0]
    expected = net.eval()(x)
    if way == "compiled":
        graph = torch.compile(net, backend="eager", fullgraph=True)
    else:
        graph = torch.export.export(net, (x,), strict=way == "exported by dynamo").module()
    torch.testing.assert_close(graph(x), expected)
    train(net.train(), optimizer, 2)


def test_a_compiled_loss_is_read_by_its_targets(rule, device, dtype):
    """It cannot be differentiated twice: the error says so, and ``targets=`` does not need it."""
    results = []
    for compiled in (False, True):
        net = make_net(device, dtype, outputs={"reg": 2})
        optimizer = wrap(net, "sgd", rule)
        loss = torch.compile(F.mse_loss, backend="aot_eager") if compiled else F.mse_loss
        for index in range(5):
            x, labels = make_batch(device, dtype, seed=index, outputs={"reg": 2})
            optimizer.zero_grad()
            losses = {"reg": loss(net(x)["reg"], labels["reg"])}
            if compiled and index == 0:
                with pytest.raises(LossError, match=r"compiled.*targets="):
                    optimizer.step(losses)
                losses = {"reg": loss(net(x)["reg"], labels["reg"])}
            optimizer.step(losses, targets=labels)
        results.append(parameters(net)[:2])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_the_mathematics_is_one_graph(scale, full, device, dtype):
    """Moments, given what the posterior computes once and keeps, and their aggregation."""
    root = torch.randn(3, 5, 5, device=device, dtype=dtype)
    factor = torch.linalg.cholesky(root @ root.mT + torch.eye(5, device=device, dtype=dtype))
    posterior = Gaussian(torch.randn(3, 5, device=device, dtype=dtype), factor)
    _ = posterior.whitener, posterior.covariance, posterior.variance
    s = torch.tensor([0.5, 1.0, 0.0], device=device, dtype=dtype)
    present = torch.rand(6, 3, device=device) > 0.3 if full else None

    def moments(h, y):
        return regression_moments(h, y, posterior, 4, full)

    def aggregate(mean, log_variance):
        return aggregate_diagonal(mean, log_variance, s, present, scale)

    features = torch.randn(6, 5, device=device, dtype=dtype)
    targets = torch.randn(6, 3, device=device, dtype=dtype)
    pair = torch.randn(2, 6, 3, 4, device=device, dtype=dtype)
    for function, args in ((moments, (features, targets)), (aggregate, tuple(pair))):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), function(*args))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_the_default_rule_is_one_graph(weighted, device, dtype):
    """From the evidence on."""
    features = torch.randn(1, 6, 5, device=device, dtype=dtype)
    targets = torch.randn(2 if weighted else 1, 6, 3, device=device, dtype=dtype)
    weights = torch.rand(2, 6, 1, device=device, dtype=dtype) if weighted else None

    def gradient(h, y):
        shared = h if weights is None else h * weights
        gram, shift = shared.mT @ h, y.mT @ shared
        posterior = Spectrum.of(gram, shift, y.square().mean(1))
        left = leave_one_out(h, y, posterior, weights)
        noise, factor = y.square().mean(1), torch.ones_like(y[:, :1])
        return student_gradient(left, posterior, 4, noise, factor, 10.0, weights)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, targets), gradient(features, targets))

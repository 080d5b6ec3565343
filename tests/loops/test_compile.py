"""``torch.compile`` around trunk, heads and losses, and of the mathematics itself."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch.nn import functional as F

from bayesagg.aggregation import aggregate_diagonal
from bayesagg.errors import CaptureError, LossError
from bayesagg.moments import regression_moments
from bayesagg.posterior import Gaussian
from tests.helpers import QUICK, make_batch, make_losses, make_net, snapshot, train, wrap
from tests.loops.test_distributed import trunk

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile's, about parts of torch itself


@pytest.fixture(autouse=True)
def _fresh():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def trunk_method(net, **kwargs):
    net.trunk.compile(**kwargs)


def trunk_function(net, **kwargs):
    net.trunk = torch.compile(net.trunk, **kwargs)


def all_methods(net, **kwargs):
    for module in (net.trunk, *net.heads.values()):
        module.compile(**kwargs)


def all_functions(net, **kwargs):
    trunk_function(net, **kwargs)
    for name in list(net.heads):
        net.heads[name] = torch.compile(net.heads[name], **kwargs)


def whole_method(net, **kwargs):
    net.compile(**kwargs)


BEFORE = {
    "all_functions": all_functions,
    "trunk_function": trunk_function,
}  # it wraps what it is given
AFTER = {"all_methods": all_methods, "trunk_method": trunk_method, "whole_method": whole_method}


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def compare(compile_net, early, device, dtype, steps=7, **kwargs):
    plain = make_net(device, dtype)
    train(plain, wrap(plain, "momentum", settings=QUICK), steps)
    net = make_net(device, dtype)
    if early:
        compile_net(net, **kwargs)
    optimizer = wrap(net, "momentum", settings=QUICK)
    if not early:
        compile_net(net, **kwargs)
    train(net, optimizer, steps)
    torch.testing.assert_close(parameters(net), parameters(plain))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [(kind, "eager") for kind in [*BEFORE, *AFTER]]
    + [("all_functions", "aot_eager"), ("whole_method", "aot_eager")],
)
def test_compiled_parts_train_alike(kind, backend, device, dtype):
    """Over pre-training and the epochs after it, with heads that the posterior writes."""
    compare({**BEFORE, **AFTER}[kind], kind in BEFORE, device, dtype, backend=backend)


@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend(device):
    """Inductor, for the trunk, in one graph: hooks are outside of it."""
    net = make_net(device, torch.float32, trunk=trunk)
    trunk_function(net, fullgraph=True)
    plain = make_net(device, torch.float32, trunk=trunk)
    for one in (net, plain):
        train(one, wrap(one, "sgd", settings=QUICK), 5)
    torch.testing.assert_close(parameters(net), parameters(plain))


def test_parts_compile_without_a_break(device, dtype):
    compare(all_functions, True, device, dtype, backend="eager", fullgraph=True)


def test_a_whole_model_without_breaks_is_refused(device, dtype):
    """The hooks would have no tensors to see; the message says what to compile."""
    net = make_net(device, dtype)
    optimizer = wrap(net, settings=QUICK)
    model = torch.compile(net, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the shared network and each"):
        model(make_batch(device, dtype)[0])
    train(net, optimizer, 4)


def test_a_model_that_ran_before_it_was_wrapped_is_refused(device, dtype):
    """Its graph was made without the hooks."""
    net = make_net(device, dtype)
    model = torch.compile(net, backend="eager")
    x, labels = make_batch(device, dtype)
    model(x)
    optimizer = wrap(net, settings=QUICK)
    before = snapshot(net, optimizer)["parameters"]
    with pytest.raises(CaptureError, match="compile the shared network and the heads apart"):
        optimizer.step(make_losses(model(x), labels))
    after = snapshot(net, optimizer)["parameters"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_compiled_loss_is_read_by_its_targets(device, dtype):
    """It cannot be differentiated twice: the error says so, and ``targets=`` does not need it."""
    results = []
    for compiled in (False, True):
        net = make_net(device, dtype, outputs={"reg": 2})
        optimizer = wrap(net, "sgd", pretrain_epochs=0)
        loss = torch.compile(F.mse_loss, backend="aot_eager") if compiled else F.mse_loss
        for index in range(4):
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


# --- the mathematics -----------------------------------------------------------------------------


def one_graph(function, *args):
    """Equal to the plain function, in one graph (``fullgraph`` raises at a break)."""
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), function(*args))


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("partial", [False, True])
def test_the_aggregation_is_one_graph(partial, scale, device, dtype):
    mean, log_variance = torch.randn(2, 6, 3, 4, device=device, dtype=dtype)
    s = torch.tensor([0.5, 1.0, 0.0], device=device, dtype=dtype)
    present = torch.rand(6, 3, device=device) > 0.3 if partial else None
    one_graph(lambda *a: aggregate_diagonal(*a, present, scale), mean, log_variance, s)


@pytest.mark.parametrize("full", [False, True])
def test_regression_moments_are_one_graph(full, device, dtype):
    """Given what the posterior computes once and keeps."""
    root = torch.randn(3, 5, 5, device=device, dtype=dtype)
    factor = torch.linalg.cholesky(root @ root.mT + torch.eye(5, device=device, dtype=dtype))
    posterior = Gaussian(torch.randn(3, 5, device=device, dtype=dtype), factor)
    _ = posterior.whitener, posterior.covariance, posterior.variance
    features = torch.randn(6, 5, device=device, dtype=dtype)
    targets = torch.randn(6, 3, device=device, dtype=dtype)
    one_graph(lambda h, y: regression_moments(h, y, posterior, 4, full), features, targets)

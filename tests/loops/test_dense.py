"""Dense and sequence heads: ignored pixels, memory, and inference from a subset of the data."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayesagg.rules.combine
import bayesagg.rules.paper
import bayesagg.rules.streaming
from bayesagg import BayesAgg, BinaryHead, MulticlassHead, PaperRule, RegressionHead
from bayesagg.posterior import weighted_gram
from bayesagg.reading import Labels
from bayesagg.rules.subset import draw
from tests.helpers import (
    OPTIMIZERS,
    assert_same,
    difference,
    make_batch,
    rule_of,
    snapshot,
    wrap,
)
from tests.loops.runs import assert_near, losses_over, plain_net, without

TASKS = {"depth": 1, "edge": 1, "class": 3}
BATCH, POSITIONS, WIDTH = 2, (2, 3, 2), 4
N = BATCH * 2 * 3 * 2

# A batch of rows [N, c] as a layout sees it, every one with positions in the order of the rows.
SHAPES = {
    "tokens": (BATCH, 12),
    "grid": (BATCH, 4, 3),
    "conv1d": (BATCH, 12),
    "conv2d": (BATCH, 4, 3),
    "conv3d": (BATCH, *POSITIONS),
}
CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


class Dense(nn.Module):
    """A pointwise network on rows ``[N, 3]``, or the same on tokens or maps."""

    def __init__(self, kind="rows"):
        super().__init__()
        self.kind = kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rows = {name: nn.Linear(WIDTH, o) for name, o in TASKS.items()}
            self.trunk = nn.Sequential(self._layer(nn.Linear(3, WIDTH)), nn.Tanh())
        self.heads = nn.ModuleDict({name: self._layer(linear) for name, linear in rows.items()})

    def _layer(self, linear):
        if self.kind not in CONVOLUTIONS:
            return linear
        conv = CONVOLUTIONS[self.kind](linear.in_features, linear.out_features, 1)
        conv.load_state_dict({"weight": linear.weight.view(conv.weight.shape), "bias": linear.bias})
        return conv

    def shape(self, rows):
        """Rows ``[N, c]`` in this layout."""
        if self.kind == "rows":
            return rows
        shaped = rows.view(*SHAPES[self.kind], rows.shape[1])
        return shaped.movedim(-1, 1) if self.kind in CONVOLUTIONS else shaped

    def classes_first(self, logits):
        """As ``F.cross_entropy`` wants them."""
        return logits if self.kind in {"rows", *CONVOLUTIONS} else logits.movedim(-1, 1)

    def forward(self, x):
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def make(kind="rows", device="cpu", dtype=torch.float64):
    return Dense(kind).to(device, dtype)


def heads_of(net, rule="paper", *, s=0.5, noise=1.0):
    """The default rule knows of no exponents; its scales are learned."""
    own, regression = ({"s": s}, {"s": s, "noise_variance": noise})
    if not isinstance(rule_of(rule), PaperRule):
        own = regression = {}
    return {
        "depth": RegressionHead(net.heads["depth"], **regression),
        "edge": BinaryHead(net.heads["edge"], **own),
        "class": MulticlassHead(net.heads["class"], **own),
    }


def engine_of(net, heads=None, **rule):
    return BayesAgg(net.trunk, heads or heads_of(net), rule=PaperRule(**rule))


def batch(seed, device, dtype, size=N):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    z = x @ torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    labels = {"depth": z[:, :1], "edge": (z[:, 1:2] > 0).to(dtype), "class": z[:, 2:].argmax(1)}
    return x.to(device, dtype), {
        n: y.to(device) if n == "class" else y.to(device, dtype) for n, y in labels.items()
    }


def losses_of(out, labels):
    """Means over the labelled data, without any of the others in the graph."""
    losses = {}
    for name, criterion in (("depth", F.mse_loss), ("edge", F.binary_cross_entropy_with_logits)):
        kept = ~labels[name].isnan()
        losses[name] = criterion(out[name][kept], labels[name][kept])
    losses["class"] = F.cross_entropy(out["class"], labels["class"])
    return losses


def losses_in(net, out, labels):
    """The same for shaped outputs and labels."""
    shaped = {name: net.shape(labels[name]) for name in ("depth", "edge")}
    shaped["class"] = net.shape(labels["class"][:, None]).squeeze(
        -1 if net.kind not in CONVOLUTIONS else 1
    )
    out = {**out, "class": net.classes_first(out["class"])}
    return losses_of(out, shaped), shaped


def ignore(labels, seed):
    """A third of the labels of every task is missing, each of its own."""
    generator = torch.Generator().manual_seed(seed)
    missing = torch.rand(3, len(labels["class"]), generator=generator) < 1 / 3
    missing = missing.to(labels["class"].device)
    labels = {name: y.clone() for name, y in labels.items()}
    labels["depth"][missing[0]] = torch.nan
    labels["edge"][missing[1]] = torch.nan
    labels["class"][missing[2]] = -100
    return labels, missing


# --- ignored pixels ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("given", [False, True], ids=["masked_losses", "targets"])
def test_ignored_positions_equal_rows_without_labels(kind, given, rule, device, dtype):
    """Maps and tokens with holes train as the flattened problem does; the holes say nothing."""
    nets = [make("rows", device, dtype), make(kind, device, dtype)]
    optimizers = [wrap(net, "sgd", rule, heads=heads_of(net, rule)) for net in nets]
    counts = torch.zeros(3)
    for index in range(6):
        x, labels = batch(index, device, dtype)
        labels, missing = ignore(labels, index)
        counts += (~missing).sum(1) * (index > 2)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            h = net.trunk(net.shape(x))
            h.retain_grad()
            out = {name: head(h) for name, head in net.heads.items()}
            losses, shaped = losses_in(net, out, labels)
            optimizer.step(losses, targets=shaped if given else None)
            rows = h.grad.movedim(1, -1) if kind in CONVOLUTIONS and net.kind == kind else h.grad
            silent = (rows.reshape(-1, WIDTH) == 0).all(1)
            assert torch.equal(silent, missing.all(0))
    ours, theirs = (list(net.parameters()) for net in nets)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two.view_as(one))
    memories = [o.state_dict()["bayesagg"]["memory"] for o in optimizers]
    assert_near(*memories, tolerance=1e-7 if dtype == torch.float64 else 1e-3)
    if rule == "paper":
        seen = [group["full"]["count"][0] for group in memories[1]["groups"]]
        assert [int(count) for count in seen] == counts.tolist()


# --- memory --------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("missing", [False, True])
def test_memory_is_bounded(missing, rule, device, monkeypatch):
    """Of many data and outputs: tensors of both by dimension are made in chunks, for the same end."""
    outputs, size, chunk = {"reg": 16, "bin": 16, "cls": 3}, 4000, 1 << 13
    results, largest = [], []
    for bound in (1 << 30, chunk):
        for module in (bayesagg.rules.combine, bayesagg.rules.streaming):
            monkeypatch.setattr(module, "_CHUNK", bound)
        monkeypatch.setattr(weighted_gram, "__defaults__", (bound,))
        net = plain_net(device, outputs=outputs)
        optimizer = wrap(net, "sgd", rule)
        generator = torch.Generator().manual_seed(0)
        for index in range(4):
            x, labels = make_batch(device, seed=index, size=size, outputs=outputs)
            for name in labels if missing else ():
                gaps = torch.rand(labels[name].shape, generator=generator) < 0.3
                labels = without(labels, name, gaps.to(device))
            losses = losses_over(net(x), labels)
            optimizer.zero_grad()
            with Largest() as seen:
                optimizer.step(losses)
        results.append([list(net.parameters()), optimizer.state_dict()["bayesagg"]["memory"]])
        largest.append(seen.numel)
    assert_near(*results)
    assert largest[1] <= max(8 * chunk, size * 35)  # outputs of all heads, which there are anyway
    if missing or rule == "paper":  # else the default rule takes products of matrices
        assert largest[1] < largest[0] / 2


# --- a subset of the data ------------------------------------------------------------------------
# ``max_data`` is a setting of the paper's rule: its moments take a tensor of data, tasks and
# dimensions. The default rule takes a product of matrices for all data.


def train(net, optimizer, steps, *, missing=False, size=N):
    like = next(net.parameters())
    for index in steps:
        x, labels = batch(index, like.device, like.dtype, size)
        labels = ignore(labels, index)[0] if missing else labels
        optimizer.zero_grad()
        optimizer.step(losses_of(net(x), labels))


def run(device, dtype, steps=range(6), *, net=None, missing=False, size=N, noise=1.0, **kwargs):
    net = net or make("rows", device, dtype)
    optimizer = wrap(net, "adam", "paper", heads=heads_of(net, noise=noise), **kwargs)
    train(net, optimizer, steps, missing=missing, size=size)
    return net, optimizer


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("max_data", [N, 10 * N])
def test_a_subset_of_all_is_all(max_data, missing, device, dtype):
    """Where it is no smaller than the batch, ``max_data`` changes no bit."""
    results = [snapshot(*run(device, dtype, missing=missing, max_data=m)) for m in (None, max_data)]
    assert_same(*results)


def test_a_subset_depends_on_the_seed_alone(device, dtype):
    """The global generator has no say; another seed gives other subsets."""
    results = []
    for outer, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(outer)
        results.append(snapshot(*run(device, dtype, max_data=7, seed=seed))["parameters"])
    assert_same(results[0], results[1])
    assert difference(results[0], results[2]) is not None


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_run_with_subsets_resumes_in_the_same_bits(stop, device, dtype):
    whole = run(device, dtype, range(8), max_data=7, noise="learned")
    first = run(device, dtype, range(stop), max_data=7, noise="learned")
    file = io.BytesIO()
    torch.save((first[0].state_dict(), first[1].state_dict()), file)
    file.seek(0)
    second = run(device, dtype, range(30, 32), max_data=7, noise="learned")
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, range(stop, 8))
    assert_same(snapshot(*whole), snapshot(*second))


def labels_with(present):
    """Labels of which only the mask matters."""
    filler = torch.zeros(len(present), 1)
    return [Labels(filler, filler, torch.ones(1, 1), present[:, None])]


@pytest.mark.parametrize("max_data", [1, 4, 7, 10])
def test_every_labelled_datum_is_drawn_as_often(max_data):
    """So that sums over the subset, scaled, are unbiased; never a datum without a label."""
    present = torch.arange(16) % 3 != 1  # 11 of 16
    counts, repeats = torch.zeros(16, dtype=torch.float64), 6000
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        subset = draw(labels_with(present), 16, max_data, generator)
        assert len(subset.index) == max_data and subset.scale == 11 / max_data
        counts += torch.bincount(subset.index, minlength=16)
    expected = present.double() / subset.scale
    assert torch.equal(counts == 0, ~present)
    # Five standard errors of a proportion.
    assert ((counts / repeats - expected).abs() < 5 * (0.25 / repeats) ** 0.5).all()


def test_few_labelled_data_are_all_used():
    present = torch.arange(16) < 5
    assert draw(labels_with(present), 16, 5, torch.Generator()) is None
    assert draw(labels_with(present), 16, 4, torch.Generator()) is not None


@pytest.mark.parametrize("noise", [1.0, "learned"])
def test_equal_data_make_a_subset_exact(noise, device, dtype):
    """Copies of one datum: its scaled evidence is that of the batch, and so are the weights."""
    results = []
    for max_data in (None, 4):
        net = make("rows", device, dtype)
        engine = engine_of(net, heads_of(net, noise=noise), max_data=max_data)
        for index in range(6):
            x, labels = batch(index, device, dtype, 1)
            x, labels = x.expand(20, -1), {n: y.expand(20, *y.shape[1:]) for n, y in labels.items()}
            engine.backward(losses_of(net(x), labels))
            if index % 2:
                engine.end_epoch()
        state = engine.get_extra_state()
        results.append([state["memory"]["groups"], state["task_weights"]])
    assert results[0][0][0]["full"]["count"].tolist() == [40]
    assert_near(*results, tolerance=1e-7 if dtype == torch.float64 else 1e-3)


class Spy:
    """Stands before ``combine`` and ``extend``, and keeps what they were given."""

    def __init__(self, monkeypatch):
        self.calls = {}
        for name in ("combine", "extend"):
            self.calls[name] = getattr(bayesagg.rules.paper, name)
            monkeypatch.setattr(bayesagg.rules.paper, name, getattr(self, name))

    def combine(self, groups, features, labels, posteriors, **kwargs):
        self.groups, self.labels, self.posteriors = groups, labels, posteriors
        self.features = features[True]
        self.alone, weights = self.calls["combine"](groups, features, labels, posteriors, **kwargs)
        return self.alone.clone(), weights

    def extend(self, index, *args):
        self.index, self.means = index, {}
        for group, posterior in zip(self.groups, self.posteriors, strict=True):
            self.means.update(group.means(posterior))
        return self.calls["extend"](index, *args)


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("missing", [False, True])
def test_gradient_inside_and_outside_the_subset(missing, scale, device, dtype, monkeypatch):
    """Inside: Eq. 7 of those data alone. Outside: the mean weights on the gradients of autograd
    at the posterior mean, datum by datum."""
    spy = Spy(monkeypatch)
    net = make("rows", device, dtype)
    engine = engine_of(net, max_data=9, pretrain_epochs=0, gradient_scale=scale)
    x, labels = batch(3, device, dtype)
    labels = ignore(labels, 5)[0] if missing else labels
    h = net.trunk(x)
    h.retain_grad()
    losses = losses_of({n: head(h) for n, head in net.heads.items()}, labels)
    engine.backward(losses)
    inside = torch.zeros(N, dtype=torch.bool, device=device)
    inside[spy.index] = True
    assert 0 < inside.sum() <= 9
    torch.testing.assert_close(h.grad[spy.index], spy.alone.to(dtype))
    expected = outside(spy, h, labels, scale)
    torch.testing.assert_close(h.grad[~inside], expected[~inside])
    assert (h.grad[~inside].abs().sum(1) > 0).sum() > 5


def outside(spy, h, labels, scale):
    """The gradient at every datum by the formula of :mod:`bayesagg.rules.subset`, naively."""
    present = {n: ~y.isnan()[:, 0] for n, y in labels.items() if n != "class"}
    present["class"] = labels["class"] != -100
    alpha = conditional_weights(spy, present)
    leaf = h.detach().double().requires_grad_()
    result = torch.zeros_like(leaf)
    for i in range(len(leaf)):
        own = [n for n in TASKS if bool(present[n][i])]
        norm = sum(alpha[n] for n in own)
        for n in own:
            mean = spy.means[n].double()
            z = leaf[i] @ mean[:, :-1].mT + mean[:, -1]
            y = labels[n][i : i + 1]
            count = int(present[n].sum())
            if n == "class":
                loss = F.cross_entropy(z[None], y) / count
            elif n == "edge":
                loss = F.binary_cross_entropy_with_logits(z, y[0].double()) / count
            else:
                loss = F.mse_loss(z, y[0].double()) / count
            [gradient] = torch.autograd.grad(loss, leaf)
            result[i] += alpha[n] / norm * gradient[i] * (len(own) if scale == "sum" else 1)
    return result.to(h.dtype)


def conditional_weights(spy, present):
    """α by task and dimension, the mean over the data of the subset that have a label of it."""
    log_variance, factors = {}, {}
    generator = torch.Generator(spy.features.device)
    for group, known, posterior in zip(spy.groups, spy.labels, spy.posteriors, strict=True):
        given = (spy.features, known.targets, posterior, generator, spy.features.dtype)
        _, relative, log_scale = group.likelihood.moments(*given)
        second = relative.log() + log_scale
        for k, n in enumerate(group.heads):
            log_variance[n] = second[:, k]
            factors[n] = float(known.factor[0, k])
    alpha = {n: [] for n in log_variance}
    for row, datum in enumerate(spy.index.tolist()):
        own = [n for n in alpha if bool(present[n][datum])]
        score = [-0.5 * (log_variance[n][row] + 2 * torch.tensor(factors[n]).log()) for n in own]
        for n, value in zip(own, torch.softmax(torch.stack(score), 0), strict=True):
            alpha[n].append(value)
    return {n: torch.stack(values).mean(0) for n, values in alpha.items()}


def test_certain_posteriors_and_uniform_weights_are_linear_scalarization(device):
    """As S → 0, with s = 0, inside and outside alike."""
    net = make("rows", device, torch.float64)
    x, _ = batch(0, device, torch.float64)
    with torch.no_grad():
        depth = net(x)["depth"] + 0.1  # by another bias: the end of the epoch will find it
    head = RegressionHead(net.heads["depth"], s=0.0, prior_variance=1e12, noise_variance=1e-12)
    engine = engine_of(net, {"depth": head}, max_data=8)
    for _ in range(50):  # so that the batch below hardly moves the posterior
        engine.backward({"depth": F.mse_loss(net(x)["depth"], depth)})
    engine.end_epoch()
    torch.testing.assert_close(net(x)["depth"], depth, rtol=0, atol=1e-5)
    target = depth + torch.randn(N, 1, device=device, dtype=torch.float64) * 1e-3
    grads = []
    for plain in (True, False):
        h = net.trunk(x)
        h.retain_grad()
        loss = F.mse_loss(net.heads["depth"](h), target)
        if plain:
            loss.backward()
        else:
            engine.backward({"depth": loss})
        grads.append(h.grad)
    torch.testing.assert_close(*grads, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, True, "all"])
def test_max_data_is_a_positive_integer(wrong):
    """More of it in ``tests/rules/test_paper.py``."""
    with pytest.raises(ValueError, match="max_data"):
        PaperRule(max_data=wrong)


def test_maps_take_a_subset_too(device, dtype):
    """The same step from rows and from maps, whose order of data is that of the rows."""
    results = []
    for kind in ("rows", "conv2d"):
        net = make(kind, device, dtype)
        engine = engine_of(net, max_data=7, pretrain_epochs=0)
        x, labels = batch(0, device, dtype)
        losses, _ = losses_in(net, net(net.shape(x)), labels)
        engine.backward(losses)
        results.append([p.grad.view(-1) for p in net.trunk.parameters()])
    torch.testing.assert_close(*results)


def test_a_subset_without_a_task_leaves_it_a_say(device, dtype):
    """One labelled pixel of a task outside the subset: uniform weights, not zero, not NaN."""
    net = make("rows", device, dtype)
    engine = engine_of(net, max_data=1, pretrain_epochs=0)
    x, labels = batch(0, device, dtype)
    labels = {name: y.clone() for name, y in labels.items()}
    labels["edge"][1:] = torch.nan
    labels["class"][1:] = -100
    h = net.trunk(x)
    h.retain_grad()
    engine.backward(losses_of({n: head(h) for n, head in net.heads.items()}, labels))
    assert torch.isfinite(h.grad).all() and (h.grad.abs().sum(1) > 0).all()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    optimizer.step()
    engine.end_epoch()
    assert all(torch.isfinite(p).all() for p in net.parameters())

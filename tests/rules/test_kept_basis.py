"""Wide heads: an eigenbasis of the evidence serves for some steps of the default rule.

Of that rule alone: the paper's has another posterior, and renews it in every step.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import BayesAgg, BinaryHead, LikelihoodRule, RegressionHead
from bayesagg.moments import Spectrum

WIDTH, BATCH, MEMORY = 129, 64, 1300  # 130 weights with the bias
INTERVAL = int(0.25 * MEMORY / BATCH)  # steps in which a quarter of the evidence is new
RULE = LikelihoodRule(memory=MEMORY, warmup=0)


class Run:
    """Features that drift, a regression and a binary task on them."""

    def __init__(self, seed=0, drift=0.01, rule=RULE, dtype=torch.float64):
        torch.manual_seed(seed)
        self.heads = nn.ModuleDict({"reg": nn.Linear(WIDTH, 2), "bin": nn.Linear(WIDTH, 1)})
        self.heads.to(dtype)
        self.dtype = dtype
        settings = {"reg": RegressionHead(self.heads["reg"]), "bin": BinaryHead(self.heads["bin"])}
        self.engine, self.drift = BayesAgg(None, settings, rule=rule), drift
        turn = torch.randn(WIDTH, WIDTH).double() / WIDTH**0.5
        self.turn = torch.matrix_exp(drift * (turn - turn.T))
        self.truth = 3 * torch.randn(WIDTH, 2).double() / WIDTH**0.5

    def step(self, index):
        """One backward pass; the gradient at the features."""
        generator = torch.Generator().manual_seed(index)
        scales = torch.logspace(0, -1, WIDTH).double()
        x = scales * torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
        x = x @ torch.linalg.matrix_power(self.turn, index)
        y = x @ self.truth
        y += 0.5 * torch.randn(BATCH, 2, generator=generator, dtype=torch.float64)
        x, y = x.to(self.dtype).requires_grad_(), y.to(self.dtype)
        loss = F.mse_loss(self.heads["reg"](x), y)
        sick = F.binary_cross_entropy_with_logits(self.heads["bin"](x), (y[:, :1] > 0).to(y))
        self.engine({"reg": loss, "bin": sick}).backward()
        return x.grad

    def weights(self):
        """Of all outputs, ``[3, D]``."""
        parts = [torch.cat([h.weight, h.bias[:, None]], 1) for h in self.heads.values()]
        return torch.cat(parts).detach()

    def left(self):
        """Steps that the basis has left."""
        [unit] = self.engine.get_extra_state()["memory"]["units"]
        return unit["basis"]["left"]


def relative(ours, exact):
    return float(((ours - exact).norm(dim=1) / exact.norm(dim=1)).max())


@pytest.mark.parametrize("drift", [0.0, 1e-2])
def test_a_kept_basis_is_as_good_as_a_new_one(drift, monkeypatch):
    """Step by step, from the same state: means, and gradients at the features."""
    run, means, gradients, left = Run(drift=drift), [], [], []
    for index in range(3 * MEMORY // BATCH):
        exact = copy.deepcopy(run)
        gradient = run.step(index)
        with monkeypatch.context() as patch:
            patch.setattr("bayesagg.rules.streaming._LARGE", 10**6)
            best = exact.step(index)
        means.append(relative(run.weights(), exact.weights()))
        gradients.append(float((gradient - best).norm() / best.norm()))
        left.append(run.left())
    assert left[:5] == [0, 0, 0, 0, 1]  # a quarter of the evidence is new at once, at the start
    renewed = [0, *(i for i in range(1, len(left)) if left[i] >= left[i - 1])]
    assert max(means[i] for i in renewed) < 1e-9
    assert max(gradients[i] for i in renewed) < 1e-9
    full = [i for i in renewed if i > 2 * MEMORY // BATCH]
    assert all(INTERVAL - 1 <= left[i] <= INTERVAL + 1 for i in full)
    assert 1e-9 < max(means) < 0.02
    assert 1e-9 < max(means[full[0] :]) < 3e-3
    assert max(gradients) < 0.1


@pytest.mark.parametrize("large", [0, 10**6], ids=["kept", "new"])
def test_a_network_in_single_precision_loses_nothing_but_digits(large, monkeypatch):
    """Beside the same network in double precision, with a basis that is kept and without."""
    monkeypatch.setattr("bayesagg.rules.streaming._LARGE", large)
    double, single = Run(), Run(dtype=torch.float32)
    for index in range(2 * MEMORY // BATCH):
        one, other = double.step(index), single.step(index).double()
        assert float((one - other).norm() / one.norm()) < 1e-5
        assert relative(single.weights().double(), double.weights()) < 1e-5


def test_narrow_heads_keep_no_basis():
    torch.manual_seed(0)
    head = nn.Linear(127, 1)  # 128 weights
    engine = BayesAgg(None, {"y": RegressionHead(head)}, rule=RULE)
    x = torch.randn(8, 127, requires_grad=True)
    engine({"y": F.mse_loss(head(x), torch.randn(8, 1))}).backward()
    assert engine.get_extra_state()["memory"]["units"][0]["basis"] is None


@pytest.mark.parametrize("stop", [3, INTERVAL, INTERVAL + 1, INTERVAL + 5])
def test_a_run_goes_on_in_the_same_bits(stop):
    """Before the basis is renewed, then, and after."""
    run = Run()
    for index in range(stop):
        run.step(index)
    other = Run(seed=1)
    other.turn, other.truth = run.turn, run.truth
    other.step(99)
    other.heads.load_state_dict(run.heads.state_dict())
    other.engine.load_state_dict(copy.deepcopy(run.engine.state_dict()))
    for index in range(stop, stop + 2 * INTERVAL):
        assert torch.equal(run.step(index), other.step(index))
    for one, two in zip(run.heads.parameters(), other.heads.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("old", [0.05, 0.3, 1.0])
def test_conjugate_gradients_shrink_the_error(old, monkeypatch):
    """However old the basis is; and the more of them, the more."""
    torch.manual_seed(0)
    d = 40
    before, after = (torch.randn(2, 3 * d, d).double() for _ in range(2))
    gram = before.mT @ before
    vectors = torch.linalg.eigh(gram)[1]
    new = (1 - old) * gram + old * after.mT @ after
    shift, ridge = torch.randn(2, 3, d).double(), torch.rand(2, 3).double() + 0.1
    start = Spectrum.of(gram, shift, ridge).mean
    exact = Spectrum.of(new, shift, ridge)
    values = (torch.bmm(new, vectors) * vectors).sum(1)

    def error(mean):
        """In the norm of the posterior, which conjugate gradients decrease."""
        off = mean - exact.mean
        square = (off * (off @ new + ridge[..., None] * off)).sum(2)
        return float(square.sqrt().max())

    errors = [error(start)]
    for iterations in (1, 2, 4, 16):
        monkeypatch.setattr("bayesagg.moments.student._ITERATIONS", iterations)
        errors.append(error(Spectrum.near(new, shift, ridge, vectors, values, start).mean))
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(errors))


def test_the_eigenbasis_itself_gives_the_exact_posterior():
    torch.manual_seed(0)
    x = torch.randn(1, 30, 12).double()
    gram, shift, ridge = x.mT @ x, torch.randn(1, 3, 12).double(), torch.rand(1, 3).double()
    exact = Spectrum.of(gram, shift, ridge)
    values = torch.linalg.eigvalsh(gram)
    near = Spectrum.near(gram, shift, ridge, exact.vectors, values, torch.zeros_like(shift))
    torch.testing.assert_close(near.mean, exact.mean)
    torch.testing.assert_close(near.inverse, exact.inverse)

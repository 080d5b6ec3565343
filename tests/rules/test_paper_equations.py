"""The gradient that arrives at h, against Eq. 2-11 computed naively from the same data.

Of the paper's rule; ``test_likelihood.py`` does the same for the default one.

The representation is a free parameter, so what an encoder would receive can be read off its
gradient. One epoch of pre-training makes the full-data posterior; the next step is compared.
"""

import copy

import numpy as np
import pytest
import torch

from bayesagg import BayesAgg, PaperRule
from tests import reference
from tests.helpers.data import LOSSES
from tests.helpers.settings import HEADS, OUTPUTS

DATA, SHARED = 12, 3
EPOCH = [slice(0, 5), slice(5, 9), slice(9, 12)]
STEP = [1, 3, 4, 8, 11]

SETTINGS = {
    "reg": {"s": 0.85, "noise_variance": 0.5, "prior_variance": 2.0},
    "bin": {"s": 0.5, "prior_variance": 3.0},
    "cls": {"s": 0.3, "prior_variance": 1.0},
}
MIXTURES = [("reg",), ("bin",), ("cls",), ("reg", "bin"), ("reg", "bin", "cls")]
# Cubature bounds the agreement (in standard deviations), which the closed form of regression
# does not need.
EXACT = {"reg": 1e-9, "bin": 1e-4, "cls": 2e-3}


@pytest.fixture(autouse=True)
def _fine_cubature(monkeypatch):
    """The engine spends fewer nodes on a step than the comparisons below can stand."""
    monkeypatch.setattr("bayesagg.likelihoods.multiclass._NODES", 1 << 13)


class Study:
    """A free model, its engine, and labels that may be missing."""

    def __init__(self, names, device, dtype, bias=True, missing=False, seed=0, **engine):
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.names, self.bias = names, bias
        settings = engine.pop("settings", {})
        h = torch.tensor(rng.standard_normal((DATA, SHARED)), device=device, dtype=dtype)
        self.model = reference.FreeModel(h, {name: OUTPUTS[name] for name in names}, bias)
        self.settings = {name: {**SETTINGS[name], **settings.get(name, {})} for name in names}
        heads = {name: HEADS[name](self.model.heads[name], **self.settings[name]) for name in names}
        self.scale = engine.get("gradient_scale", "sum")
        self.full = engine.get("covariance", "diagonal") == "full"
        self.engine = BayesAgg(self.model.shared, heads, rule=PaperRule(**engine))
        labels = {
            "reg": rng.standard_normal((DATA, 2)),
            "bin": rng.integers(0, 2, (DATA, 2)).astype(float),
            "cls": rng.integers(0, 3, DATA),
        }
        self.labels = {n: torch.tensor(labels[n], device=device) for n in names}
        self.labels = {n: y if n == "cls" else y.to(dtype) for n, y in self.labels.items()}
        self.present = {n: torch.ones(y.shape, dtype=torch.bool) for n, y in self.labels.items()}
        if missing:
            for name, mask in self.present.items():
                self.present[name] = torch.tensor(rng.random(mask.shape) < 0.6)
            if "cls" not in names:
                self.present[names[0]][STEP[0]] = False
        self.present = {n: mask.to(device) for n, mask in self.present.items()}

    def losses(self, rows, reduction="mean", weights=None):
        """One loss per head, over the labels that are present."""
        losses = {}
        for name, out in self.model(rows).items():
            y, mask = self.labels[name][rows], self.present[name][rows]
            value = LOSSES[name](out[mask], y[mask], reduction=reduction)
            losses[name] = value * (weights or {}).get(name, 1.0)
        return losses

    def pretrain(self):
        """One epoch of linear scalarization, without an optimizer."""
        self.initial = self.weights()
        for rows in EPOCH:
            self.engine.backward(self.losses(rows))
        self.engine.end_epoch()
        return self

    def weights(self):
        """``[o, D]`` of every head, bias last."""
        return {
            n: reference.numpy(reference.head_weights(self.engine.heads[n])) for n in self.names
        }

    def arriving(self, rows, losses=None):
        """Gradient at h for the given data; all other data must receive none."""
        h = self.model.shared.h
        h.grad = None
        self.engine.backward(self.losses(rows) if losses is None else losses)
        gradient = reference.numpy(h.grad)
        others = np.ones(DATA, dtype=bool)
        others[rows] = False
        assert not gradient[others].any()
        return gradient[rows]

    # the naive side

    def posterior(self, name, k, rows, at, prior):
        """Posterior of output ``k`` (of the whole head for classes) from the given data."""
        features = reference.augmented(self.model.shared.h, self.bias)
        keep = np.arange(DATA)[rows]
        mask = reference.numpy(self.present[name]).astype(bool)
        keep = keep[mask[keep] if name == "cls" else mask[keep, k]]
        h, y = features[keep], reference.numpy(self.labels[name])[keep]
        if name == "reg":
            return reference.regression_posterior(
                h, y[:, k], *prior, tau2=self.settings[name]["noise_variance"]
            )
        if name == "bin":
            nll = reference.binary_nll(h, y[:, k])
            return reference.expanded_posterior(nll, at[name][k], *prior)
        nll = reference.multiclass_nll(h, np.eye(3)[y.astype(int)])
        return reference.expanded_posterior(nll, at[name].reshape(-1), *prior)

    def tasks(self, rows):
        """Name, output, exponent, and posterior of the step for every task."""
        now = self.weights()
        for name in self.names:
            for k in range(1 if name == "cls" else OUTPUTS[name]):
                width = now[name].size if name == "cls" else now[name].shape[1]
                gamma = self.settings[name]["prior_variance"]
                prior = np.zeros(width), gamma * np.eye(width)
                prior = self.posterior(name, k, slice(None), self.initial, prior)
                yield name, k, self.settings[name]["s"], self.posterior(name, k, rows, now, prior)

    def factors(self, rows, reduction, weights):
        """What multiplies the negative log-likelihood (or squared error) of every datum."""
        count = {n: int(self.present[n][rows].sum()) for n in self.names}
        return {
            n: (weights or {}).get(n, 1.0) / (1 if reduction == "sum" else count[n])
            for n in self.names
        }

    def moments(self, name, k, i, posterior):
        """Closed-form mean and covariance of one task's gradient at datum ``i``."""
        h = reference.augmented(self.model.shared.h, self.bias)[i]
        y = reference.numpy(self.labels[name])[i]
        if name == "reg":
            return reference.regression_moments(h, y[k], *posterior, SHARED)
        if name == "bin":
            return reference.binary_moments(h, y[k], *posterior, SHARED)[:2]
        return reference.multiclass_moments(h, np.eye(3)[int(y)], *posterior, SHARED, 81)

    def combine(self, moments, rows, tasks, factor):
        """Eq. 6 or 7 at every datum from ``moments[t][i]``; gradient and mean weight per task."""
        seen = [
            reference.numpy(self.present[n][rows] if n == "cls" else self.present[n][rows][:, k])
            for n, k, *_ in tasks
        ]
        # Only ratios of factors count for the weights; see bayesagg.combine.
        unit = np.mean([factor[n] for (n, *_), p in zip(tasks, seen, strict=True) if p.any()])
        gradient, weights = np.zeros((len(rows), SHARED)), np.zeros(len(tasks))
        self.spread = np.zeros((len(rows), 1))  # standard deviation that the tasks have together
        for i in range(len(rows)):
            here = [t for t in range(len(tasks)) if seen[t][i]]
            if not here:
                continue
            f = np.array([factor[tasks[t][0]] for t in here])
            means = np.stack([moments[t][i][0] for t in here]) * f[:, None]
            relative = (f / unit) ** 2
            s = [tasks[t][2] for t in here]
            self.spread[i] = sum(
                f_t * np.diag(moments[t][i][1]).max() ** 0.5 for f_t, t in zip(f, here, strict=True)
            )
            covariances = np.stack([moments[t][i][1] for t in here]) * relative[:, None, None]
            if self.full:
                combined, alpha = reference.aggregate_full(means, covariances, s)
            else:
                variances = np.diagonal(covariances, axis1=1, axis2=2)
                combined, alpha = reference.aggregate_diagonal(means, variances, s)
            gradient[i] = combined * (len(here) if self.scale == "sum" else 1)
            weights[here] += alpha.mean(1)
        labelled = np.any(seen, axis=0).sum()
        return gradient, weights / labelled

    def expected(self, rows, reduction="mean", weights=None):
        """Gradient at h and mean task weights by the closed forms."""
        tasks = list(self.tasks(rows))
        moments = [[self.moments(n, k, i, post) for i in rows] for n, k, _, post in tasks]
        return self.combine(moments, rows, tasks, self.factors(rows, reduction, weights))


def tolerance(study, dtype):
    """Relative error of the least exact likelihood."""
    return max([EXACT[n] for n in study.names] + [1e-9 if dtype == torch.float64 else 2e-3])


def assert_close(actual, expected, relative, spread=0.0):
    """Equal relative to the size of each datum's gradient, mean or standard deviation."""
    size = np.abs(expected).max(-1, keepdims=True) + spread
    assert np.all(np.abs(actual - expected) <= relative * size)


# --- after pre-training --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "kwargs"),
    [
        *((names, {"missing": missing}) for names in MIXTURES for missing in (False, True)),
        (("reg",), {"covariance": "full"}),
        (("reg", "bin", "cls"), {"covariance": "full"}),
        (("reg", "bin", "cls"), {"bias": False}),
    ],
)
def test_gradient_equals_equations_2_to_11(device, dtype, names, kwargs):
    """Missing labels have no say."""
    study = Study(names, device, dtype, seed=3, **kwargs).pretrain()
    expected, weights = study.expected(STEP)
    assert all(study.present[n][STEP].all() for n in names) == (not kwargs.get("missing"))
    assert_close(study.arriving(STEP), expected, tolerance(study, dtype), study.spread)
    actual = np.concatenate([reference.numpy(study.engine.task_weights[n]) for n in names])
    np.testing.assert_allclose(actual, weights, rtol=tolerance(study, dtype), atol=1e-12)
    assert actual.sum() == pytest.approx(1)


def test_nodes_of_a_training_step_beat_the_samples_of_the_paper(device, dtype, monkeypatch):
    monkeypatch.undo()
    study = Study(("cls",), device, dtype).pretrain()
    expected, _ = study.expected(STEP)
    error = np.abs(study.arriving(STEP) - expected)
    assert np.all(error < study.spread / 1024**0.5)  # one standard error of J = 1,024 samples


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_constant_factors_scale_the_gradients(device, dtype, reduction):
    weights = {"reg": 0.1, "bin": 3.0, "cls": 20.0}
    study = Study(("reg", "bin", "cls"), device, dtype).pretrain()
    expected, _ = study.expected(STEP, reduction, weights)
    actual = study.arriving(STEP, study.losses(STEP, reduction, weights))
    assert_close(actual, expected, tolerance(study, dtype), study.spread)
    plain, _ = study.expected(STEP)
    assert np.abs(plain - expected).max() > 0.1 * np.abs(plain).max()


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_a_factor_common_to_all_losses_only_scales_the_gradient(device, dtype, scale):
    names = ("reg", "bin", "cls")  # which differ in s
    study = Study(names, device, dtype).pretrain()
    state = copy.deepcopy(study.engine.get_extra_state())
    plain = study.arriving(STEP)
    weights = dict(study.engine.task_weights)
    study.engine.set_extra_state(state)
    scaled = study.arriving(STEP, study.losses(STEP, weights=dict.fromkeys(names, scale)))
    relative = 1e-9 if dtype == torch.float64 else 1e-3
    assert_close(scaled, scale * plain, relative)
    for name in names:
        torch.testing.assert_close(
            study.engine.task_weights[name], weights[name], rtol=relative, atol=relative
        )


def test_mean_scale_is_equation_7_as_printed(device, dtype):
    names = ("reg", "bin", "cls")
    total = Study(names, device, dtype).pretrain().arriving(STEP)
    mean = Study(names, device, dtype, gradient_scale="mean").pretrain().arriving(STEP)
    np.testing.assert_allclose(total, 5 * mean, rtol=1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", ["bin", "cls"])
def test_posterior_readout_of_a_classification_head(device, dtype, name):
    # The epoch's evidence was expanded at the old weights, the batch's is at the new ones.
    study = Study((name,), device, dtype, settings={name: {"readout": "posterior"}}).pretrain()
    now = study.weights()[name]
    assert np.abs(now - study.initial[name]).max() > 0.01
    expected, _ = study.expected(STEP)
    assert_close(study.arriving(STEP), expected, tolerance(study, dtype), study.spread)
    # and what was written is the mean of the full-data posterior
    width = now.size if name == "cls" else now.shape[1]
    prior = np.zeros(width), study.settings[name]["prior_variance"] * np.eye(width)
    for k in range(1 if name == "cls" else 2):
        mean, _ = study.posterior(name, k, slice(None), study.initial, prior)
        written = now if name == "cls" else now[k]
        np.testing.assert_allclose(written.reshape(-1), mean, rtol=1e-6, atol=1e-6)


# --- the reduction identity ----------------------------------------------------------------------


def ordinary(study, losses):
    """Gradient at h of the sum of the losses, by autograd alone."""
    total = sum(loss.mean() for loss in losses.values())
    (gradient,) = torch.autograd.grad(total, study.model.shared.h, retain_graph=True)
    return reference.numpy(gradient)


@pytest.mark.parametrize(("reduction", "missing"), [("mean", False), ("sum", True)])
@pytest.mark.parametrize("names", MIXTURES)
def test_without_uncertainty_it_is_linear_scalarization(device, dtype, names, reduction, missing):
    settings = {n: {"s": 0.0, "noise_variance": 1.0} if n == "reg" else {"s": 0.0} for n in names}
    study = Study(names, device, dtype, settings=settings, missing=missing, seed=3)
    reference.concentrate(study.engine)
    losses = study.losses(STEP, reduction, {"reg": 0.3, "bin": 2.0, "cls": 5.0})
    expected = ordinary(study, losses)[STEP]
    relative = 1e-8 if dtype == torch.float64 else 1e-3
    assert_close(study.arriving(STEP, losses), expected, relative)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_one_certain_task_is_linear_scalarization_for_any_exponent(device, dtype, covariance):
    settings = {"cls": {"s": 0.7}}
    study = Study(("cls",), device, dtype, settings=settings, covariance=covariance)
    reference.concentrate(study.engine, 1e10)
    losses = study.losses(STEP)
    expected = ordinary(study, losses)[STEP]
    assert_close(study.arriving(STEP, losses), expected, 1e-6 if dtype == torch.float64 else 1e-3)

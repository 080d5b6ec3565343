"""Methods that weigh gradients, by what defines them."""

import pytest
import torch
from torch import nn

from examples.comparison.gradients import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    FairGrad,
    PCGrad,
    fair_weights,
)
from examples.comparison.networks import TaskNet
from examples.comparison.tasks import criterion
from tests.examples.small import (
    AT_ONCE,
    CATALOGUE,
    GRADIENT,
    TASKS,
    build,
    combination,
    regressions,
    scaled_rows,
    targets,
)


# Heads of DB-MTL receive gradients of log losses, those of NTKMTL-SR weighted ones.
@pytest.mark.parametrize("name", [n for n in GRADIENT if n not in ("db-mtl", "ntkmtl-sr")])
def test_shared_layers_get_the_weighted_sum_and_heads_their_own_gradient(name):
    method = CATALOGUE[name]
    update, losses = build(method.update, **method.settings)
    values = list(losses().values())
    shared = list(update.model.backbone.parameters())
    each = [torch.autograd.grad(value, shared, retain_graph=True) for value in values]
    heads = list(update.model.heads.parameters())
    own = torch.autograd.grad(sum(values), heads)
    torch.manual_seed(1)
    update.backward(losses())
    weights = update.task_weights()
    for k, parameter in enumerate(shared):
        expected = sum(w * gradients[k] for w, gradients in zip(weights, each, strict=True))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
    for parameter, expected in zip(heads, own, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


class Offsets(nn.Module):
    """A backbone that is the identity plus a parameter, so that both kinds of gradient agree."""

    def __init__(self, shape):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.offset


@pytest.mark.parametrize("name", ["mgda", "imtl-g", "aligned-mtl"])
def test_the_representation_version_is_the_plain_one_on_an_identity(name):
    x, y = torch.randn(20, 5), targets(20)
    model = TaskNet(Offsets((20, 5)), 5, TASKS)
    gradients = []
    for method in (CATALOGUE[name], CATALOGUE[f"{name}-ub"]):
        update = method.update(model, AT_ONCE, 3, **method.settings)
        assert update._representation == (method is not CATALOGUE[name])
        model.zero_grad()
        update.backward(criterion(TASKS)(model(x), y))
        gradients.append(model.backbone.offset.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_representation_version_differs_elsewhere():
    weights = []
    for name in ("mgda", "mgda-ub"):
        torch.manual_seed(0)
        update, losses = build(MGDA, **CATALOGUE[name].settings)
        update.backward(losses())
        weights.append(update.task_weights())
    assert (weights[0] - weights[1]).abs().max() > 0.01


def test_mgda_is_the_point_of_smallest_norm():
    update, _ = build(MGDA)
    for spread in (0.2, 0.5, 3.0):
        rows = scaled_rows(4, 30, spread)
        weights, mean = combination(update, rows)
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(4)
        point = mean / 4
        # The point of smallest norm is the one that no other point of the hull is behind.
        assert (rows @ point > (1 - 1e-6) * point @ point).all()


def test_mgda_of_normalised_gradients():
    update, _ = build(MGDA, normalize=True)
    rows = scaled_rows(4, 30, 3.0)
    weights, _ = combination(update, rows)
    assert weights.abs().sum().item() == pytest.approx(4)
    units = rows / rows.norm(dim=1, keepdim=True)
    shares = weights * rows.norm(dim=1)
    point = (shares / shares.sum()) @ units
    assert (units @ point > (1 - 1e-6) * point @ point).all()


def test_pcgrad_of_two_tasks_conflicts_with_neither():
    update, _ = build(PCGrad, regressions(2))
    rows = torch.tensor([[1.0, 0.0, 0.5], [-3.0, 1.0, 0.2]], dtype=torch.float64)
    assert (rows @ rows.sum(0) < 0).any()  # the plain sum does
    _, mean = combination(update, rows)
    assert (rows @ mean >= -1e-9).all()
    projected = [
        rows[k] - (rows[k] @ rows[1 - k]) / rows[1 - k].square().sum() * rows[1 - k] for k in (0, 1)
    ]
    torch.testing.assert_close(mean, projected[0] + projected[1])


def test_pcgrad_leaves_gradients_that_do_not_conflict():
    update, _ = build(PCGrad)
    rows = scaled_rows(4, 30).abs()
    weights, _ = combination(update, rows)
    torch.testing.assert_close(weights, torch.ones(4, dtype=torch.float64))


def test_cagrad_is_the_best_for_the_worst_off_within_its_ball():
    update, _ = build(CAGrad, c=0.4)
    for spread in (0.5, 1.0):
        rows = scaled_rows(4, 30, spread)
        _, total = combination(update, rows)
        found, mean = total / 4, rows.mean(0)
        radius = 0.4 * mean.norm()
        assert (found - mean).norm() <= radius * (1 + 1e-3)
        tries = torch.randn(2000, 4, dtype=torch.float64) @ rows
        others = mean + radius * tries / tries.norm(dim=1, keepdim=True)
        worst = (rows @ others.T).min(0).values.max()
        assert (rows @ found).min() >= worst - 1e-3 * worst.abs()


def test_imtlg_projections_are_equal():
    update, _ = build(IMTLG)
    rows = scaled_rows(4, 30, 2.0)
    weights, mean = combination(update, rows)
    assert weights.sum().item() == pytest.approx(4)
    projections = rows @ mean / rows.norm(dim=1)
    torch.testing.assert_close(projections, projections.mean().expand(4))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_fairgrad_solves_its_equation(alpha, spread):
    rows = scaled_rows(11, 200, spread)
    rows[8:] = rows[7] + 1e-3 * rows[8:]  # nearly the same task four times
    gramian = rows @ rows.T / rows.square().sum(1).mean()
    w = fair_weights(gramian, alpha)
    assert (w > 0).all()
    torch.testing.assert_close(gramian @ w, w ** (-1 / alpha), rtol=1e-5, atol=0)
    update, _ = build(FairGrad, regressions(11), alpha=alpha)
    weights, _ = combination(update, rows)
    torch.testing.assert_close(weights, 11 * w / w.sum(), rtol=1e-4, atol=0)


def test_nash_mtl_is_the_bargaining_solution():
    method = CATALOGUE["nash-mtl"]
    update, _ = build(method.update, **method.settings)
    rows = scaled_rows(4, 30, 3.0)
    weights, mean = combination(update, rows)
    gains = weights * (rows @ mean)  # each task gains the same share
    torch.testing.assert_close(gains, gains.mean().expand(4))
    assert weights.sum().item() == pytest.approx(4)


def test_aligned_mtl_is_the_sum_of_orthogonal_gradients_of_one_length():
    update, _ = build(AlignedMTL)
    rows = scaled_rows(4, 30, 2.0)
    weights, mean = combination(update, rows)
    # The matrix with the rows' singular vectors and singular values of one: condition number one.
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    expected = (left @ right).sum(0)
    cosine = expected @ mean / expected.norm() / mean.norm()
    assert cosine.item() == pytest.approx(1, abs=1e-9)
    assert weights.abs().sum().item() == pytest.approx(4)


def test_a_gradient_of_zero_gives_equal_weights():
    update, _ = build(FairGrad)
    torch.testing.assert_close(update._weigh(torch.zeros(4, 30)), torch.ones(4))

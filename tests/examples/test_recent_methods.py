"""Each method of 2024 and later against its equations, by autograd and loops."""

import pytest
import torch

from examples.comparison.gradients import DBMTL, NTKMTL, ExcessMTL
from examples.comparison.weighting import STCH, GO4Align, UncertaintySoftOptimal
from tests.examples.small import build, regressions

SEEDED = torch.tensor([0.5, 2.0, 0.1])


def loss_update(update, **own):
    return build(update, regressions(3), **own)[0]


def test_uw_so_weights_are_a_softmax_of_inverse_losses():
    update = loss_update(UncertaintySoftOptimal, temperature=2.0)
    values = SEEDED.clone().requires_grad_()
    update.objective(values).backward()
    expected = (0.5 / SEEDED).exp()
    torch.testing.assert_close(values.grad, 3 * expected / expected.sum())
    torch.testing.assert_close(update.weights, values.grad)


def test_stch_is_a_smooth_maximum_of_log_losses_over_the_means_of_the_first_epoch():
    update = loss_update(STCH, mu=0.5)
    for factor in (1.0, 2.0, 3.0):  # an epoch of three steps
        assert float(update.objective(SEEDED * factor)) == pytest.approx(
            float((SEEDED * factor).log().sum())
        )
    values = torch.tensor([1.0, 1.0, 0.3])
    ratios = (values / (2 * SEEDED)).log()
    expected = 3 * 0.5 * torch.logsumexp(ratios / 0.5, 0)
    torch.testing.assert_close(update.objective(values), expected)


def test_go4align_weights_tasks_of_a_group_alike():
    update = loss_update(GO4Align, groups=2, rate=0.1)
    values = torch.tensor([1.0, 1.05, 0.01])
    update.objective(values)
    risks = (-0.1 * values).exp() / (-0.1 * values).exp().sum()
    own = values.sum() / values * risks
    expected = torch.stack([own[:2].mean(), own[:2].mean(), own[2]])
    torch.testing.assert_close(update.weights, 3 * expected / expected.sum())
    update.objective(values)
    assert float(update._risks[2]) > float(risks[2])  # its loss is the least


def test_excess_mtl_weights_follow_the_excess_risks():
    """In the second step, (g² / √Σg²) relative to the first, exponentiated."""
    update, _ = build(ExcessMTL, regressions(2), rate=0.5)
    first, second = torch.rand(2, 2, 7, generator=torch.Generator().manual_seed(0)) + 0.1
    risk = first.square() / (first.square() + 1e-7).sqrt()
    start = (0.5 * risk.sum(1)).softmax(0)
    torch.testing.assert_close(update._weigh(first), 2 * start)
    both = (first.square() + second.square() + 1e-7).sqrt()
    ratio = (second.square() / both).sum(1) / (risk.sum(1) + 1e-7)
    expected = (start.log() + 0.5 * ratio).softmax(0)
    torch.testing.assert_close(update._weigh(second), 2 * expected)


def test_db_mtl_adds_running_gradients_of_log_losses_of_one_length():
    update, losses = build(DBMTL, regressions(3), decay=0.5)
    shared = list(update.model.backbone.parameters())
    heads = list(update.model.heads.parameters())
    running = None
    for step in (1, 2):
        logs = [value.log() for value in losses().values()]
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(v, shared, retain_graph=True)])
                for v in logs
            ]
        )
        own = torch.autograd.grad(sum(logs), heads)
        weight = 0.5 / step**0.5
        running = rows if running is None else weight * running + (1 - weight) * rows
        lengths = running.norm(dim=1)
        expected = sum(lengths.max() / n * g for n, g in zip(lengths, running, strict=True))
        update.backward(losses())
        found = torch.cat([p.grad.flatten() for p in shared])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        for parameter, gradient in zip(heads, own, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        with torch.no_grad():  # other gradients in the second step
            for parameter in shared:
                parameter.mul_(1.1)


def test_ntkmtl_weights_come_from_the_tangent_kernels_of_mini_batches():
    update, losses = build(NTKMTL, regressions(3), parts=4)
    values = list(losses().values())
    h = update._h
    largest = []
    for value in values:
        at_h = torch.autograd.grad(value, h, retain_graph=True)[0]
        jacobian = torch.zeros(4, *h.shape)
        for part in range(4):  # 20 data, 5 a mini-batch
            jacobian[part, 5 * part : 5 * part + 5] = 4 * at_h[5 * part : 5 * part + 5]
        flat = jacobian.flatten(1)
        largest.append(torch.linalg.eigvalsh(flat @ flat.T)[-1])
    expected = (sum(largest) / torch.stack(largest)).sqrt()
    expected = 3 * expected / expected.sum()
    parameters = list(update.model.parameters())
    gradients = torch.autograd.grad(
        sum(w * v for w, v in zip(expected, values, strict=True)), parameters
    )
    update.backward(losses())
    torch.testing.assert_close(update.weights, expected)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)

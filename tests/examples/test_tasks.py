"""What tasks are measured by, against other packages, and their losses."""

import pytest
import torch
from sklearn.metrics import f1_score, mean_absolute_error, roc_auc_score
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from examples.comparison.tasks import Task, criterion, grouped, joint_accuracy, measure

BINARY = Task("b", "binary", "auroc")


def test_measures_and_losses_are_those_of_other_packages():
    tasks = (Task("r", "regression", "mae"), BINARY, Task("none", "binary", "f1"))
    tasks += (Task("c", "multiclass", "accuracy", classes=5),)
    z, logits, classes = 2 * torch.randn(500, 3), 2 * torch.randn(500, 5), torch.arange(500) % 5
    z[:, 2] = -1  # nothing to find, nothing found
    y = torch.stack([torch.randn(500), (torch.rand(500) < 0.5).float(), 0 * z[:, 2], classes], 1)
    outputs = {"regression": z[:, :1], "binary": z[:, 1:], "c": logits}
    r, b, none, c = measure(tasks, outputs, y, torch.tensor([5.0, 1.0, 1.0, 1.0]))
    assert r["mae"] == pytest.approx(5 * mean_absolute_error(y[:, 0], z[:, 0]))
    assert r["rmse"] == pytest.approx(5 * F.mse_loss(z[:, 0], y[:, 0]).sqrt().item())
    p, label = z[:, 1].sigmoid(), y[:, 1].long()
    assert b["auroc"] == pytest.approx(roc_auc_score(label, p))
    assert b["f1"] == pytest.approx(f1_score(label, z[:, 1] > 0)) and none["f1"] == 0
    # Of the probability of the class, and of the top class.
    assert b["ece"] == pytest.approx(binary_calibration_error(p, label).item(), rel=1e-4)
    expected = multiclass_calibration_error(logits.softmax(1), classes, 5)
    assert c["ece"] == pytest.approx(expected.item(), rel=1e-4)
    assert min(b["ece"], c["ece"]) > 0.05
    assert b["brier"] == pytest.approx(F.mse_loss(p, y[:, 1]).item())
    gaps = logits.softmax(1) - F.one_hot(classes, 5)
    assert c["brier"] == pytest.approx(gaps.square().sum(1).mean().item())
    assert c["accuracy"] == pytest.approx((logits.argmax(1) == classes).double().mean().item())
    losses = criterion(tasks)(outputs, y)
    assert list(losses) == ["r", "b", "none", "c"]
    torch.testing.assert_close(losses["b"], F.binary_cross_entropy(p, y[:, 1]))
    torch.testing.assert_close(losses["c"], F.cross_entropy(logits, classes))


@pytest.mark.parametrize(("labels", "error"), [([1, 1, 0, 1], 0), ([1, 1, 0, 0], 0.25)])
def test_certain_predictions_fall_into_the_last_bin(labels, error):
    z = torch.tensor([[200.0], [200.0], [-200.0], [200.0]])
    [found] = measure([BINARY], {"binary": z}, torch.tensor(labels).float()[:, None], z[:1, 0])
    assert (found["ece"], found["brier"]) == pytest.approx((error, error), abs=1e-6)


def test_losses_are_means_over_the_labels_that_are_there():
    z, y = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3)
    y[[0, 2], [1, 1]] = torch.nan
    y[:, 2] = torch.nan
    losses = criterion([Task(f"{k}", "regression", "mae") for k in range(3)])({"regression": z}, y)
    expected = [
        sum(float(z.detach()[n, k] - y[n, k]) ** 2 for n in rows) / max(len(rows), 1)
        for k, rows in enumerate((range(6), [1, 3, 4, 5], []))
    ]
    assert [value.item() for value in losses.values()] == pytest.approx(expected)
    sum(losses.values()).backward()
    assert z.grad.isfinite().all() and not z.grad[:, 2].any() and not z.grad[0, 1]


def test_tasks_have_to_be_sorted_by_kind():
    with pytest.raises(ValueError, match="sort the tasks"):
        list(grouped([BINARY, Task("r", "regression", "mae")]))


def test_joint_accuracy_is_that_of_the_best_scoring_task():
    tasks = [Task(str(k), "binary", "accuracy") for k in range(3)]
    outputs = {"binary": torch.tensor([[-1.0, -2.0, -3.0], [0.0, 2.0, 1.0]])}
    assert joint_accuracy(tasks, outputs, torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])) == 0.5

"""The presets are the published settings, and the library takes them as they are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesagg import (
    BayesAgg,
    BayesAggWrapper,
    BinaryHead,
    LikelihoodRule,
    LossTask,
    MulticlassHead,
    RegressionHead,
)
from bayesagg.errors import HeadError
from bayesagg.presets import PAPER, check_rule

HEADS = {
    "regression": (RegressionHead, 1),
    "binary": (BinaryHead, 1),
    "multiclass": (MulticlassHead, 5),
}


LOSSES = {
    "regression": lambda z: F.mse_loss(z, torch.randn(8, 1)),
    "binary": lambda z: F.binary_cross_entropy_with_logits(z, torch.rand(8, 1).round()),
    "multiclass": lambda z: F.cross_entropy(z, torch.randint(5, (8,))),
}


@pytest.mark.parametrize("name", PAPER)
def test_preset_trains(name):
    """Every kind of head of the benchmark takes its settings, and a step past pre-training."""
    preset = PAPER[name]
    kinds = [kind for kind in HEADS if getattr(preset, kind)]
    assert kinds == list(preset.s_grid)
    trunk = nn.Sequential(nn.Linear(3, 4), nn.ELU())
    modules = nn.ModuleDict({kind: nn.Linear(4, HEADS[kind][1]) for kind in kinds})
    heads = {kind: HEADS[kind][0](modules[kind], **getattr(preset, kind)) for kind in kinds}
    base = torch.optim.Adam([*trunk.parameters(), *modules.parameters()])
    optimizer = BayesAggWrapper(base, trunk, heads, steps_per_epoch=1, **preset.wrapper)
    for _ in range(preset.rule.pretrain_epochs + 1):
        h = trunk(torch.randn(8, 3))
        losses = {}
        for kind in kinds:
            losses[kind] = LOSSES[kind](modules[kind](h))
        optimizer.zero_grad()
        optimizer.step(losses)
    epochs = optimizer.state_dict()["bayesagg"]["memory"]["epoch"]
    assert epochs == preset.rule.pretrain_epochs + 1
    assert sum(float(w.sum()) for w in optimizer.task_weights.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "pretrain", "batch", "s"),
    [
        ("qm9", 50, 120, {"regression": 0.85}),
        ("cifar_mtl", 3, 128, {"binary": 5e-4}),
        ("chestxray14", 1, 256, {"binary": 5e-4}),
        ("utkface", 10, 128, {"regression": 0.3, "binary": 0.1, "multiclass": 0.1}),
    ],
)
def test_published_settings(name, pretrain, batch, s):
    preset = PAPER[name]
    assert preset.rule.pretrain_epochs == pretrain
    assert preset.rule.gradient_scale == "mean"
    assert preset.training["batch_size"] == batch
    assert {kind: getattr(preset, kind)["s"] for kind in s} == s
    assert all(s[kind] in grid for kind, grid in preset.s_grid.items())


def test_heads_with_other_settings_are_not_refused():
    nearly = {**PAPER["utkface"].multiclass, "s": 0.2}
    check_rule(LikelihoodRule(), {"a": RegressionHead(nn.Linear(4, 1), s=0.3), "b": LossTask()})
    check_rule(LikelihoodRule(), {"a": MulticlassHead(nn.Linear(4, 3), **nearly)})


@pytest.mark.parametrize("name", PAPER)
def test_heads_of_a_preset_are_refused_under_another_rule(name):
    """Rather than a hybrid that nobody published."""
    preset = PAPER[name]
    for kind in preset.s_grid:
        head = HEADS[kind][0](nn.Linear(4, HEADS[kind][1]), **getattr(preset, kind))
        with pytest.raises(HeadError, match=rf"PAPER\['{name}'\].*preset\.wrapper"):
            BayesAgg(None, {"task": head})

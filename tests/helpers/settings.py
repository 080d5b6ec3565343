"""Heads, rules and optimizers of the small multi-task models."""

from typing import Any

import pytest
import torch

from bayesagg import BinaryHead, LikelihoodRule, MulticlassHead, PaperRule, RegressionHead
from bayesagg.rules import Rule

INPUTS, WIDTH = 5, 4
HEADS = {"reg": RegressionHead, "bin": BinaryHead, "cls": MulticlassHead}
OUTPUTS = {"reg": 2, "bin": 2, "cls": 3}
PAPER_HEADS: dict[str, dict[str, Any]] = {"reg": {"s": 0.85, "noise_variance": 1.0}}

# Every behaviour is tested under both: see the fixture `rule`. Either adds losses up for three
# steps, which under the paper's rule are an epoch, and then is at work.
EPOCH = 3
RULES: dict[str, Rule] = {
    "likelihood": LikelihoodRule(warmup=EPOCH, lag=5),
    "paper": PaperRule(),
}

# A memory that no count of the data shortens.
MEMORY: dict[str, dict[str, int]] = {"likelihood": {"memory": 60}, "paper": {}}

# Linear scalarization for good.
FOREVER = {"likelihood": {"warmup": 99}, "paper": {"pretrain_epochs": 99}}

PHASES = pytest.mark.parametrize("steps", [1, EPOCH + 1], ids=["pretraining", "after"])

SAMPLES = {"moments": "monte_carlo", "num_samples": 16}
QUICK = {"cls": SAMPLES}  # cubature over three classes is most of the time of a small step
SAMPLED = {"bin": SAMPLES, "cls": SAMPLES}

READOUT = {name: {"readout": "posterior"} for name in ("reg", "bin", "cls")}
GRADIENT = {name: {"readout": "gradient"} for name in READOUT}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}

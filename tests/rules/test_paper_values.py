"""The paper's rule gives the numbers it gave before it became an object.

The values in ``paper_values.pt`` were recorded with version 0.1.0 at commit c553599, whose wrapper
took ``rule="paper"`` and the rule's settings itself. They are not to be recorded again: where one
differs, the rule has changed.

One case was: those of ``example_weights`` are of 2026-11-24, since when the weight of an example
counts in the evidence as in the gradients.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bayesagg import BayesAggWrapper, BinaryHead, MulticlassHead, RegressionHead
from bayesagg.rules import PaperRule
from tests.rules.paper_cases import CASES, Case, Net, run_case

HEADS = {"regression": RegressionHead, "binary": BinaryHead, "multiclass": MulticlassHead}
VALUES = torch.load(Path(__file__).with_name("paper_values.pt"), weights_only=True)

# Rounding moves the values by a thousandth of this: the runs are short, their trunks smooth.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def make_wrapper(case: Case, base_optimizer: torch.optim.Optimizer, model: Net) -> BayesAggWrapper:
    """A case in the terms of the library: all that has to follow its constructors."""
    heads = {
        name: HEADS[head.kind](model.heads[name], **head.settings)
        for name, head in case.heads.items()
    }
    return BayesAggWrapper(
        base_optimizer,
        shared_rep_hook=model.trunk,
        heads=heads,
        rule=PaperRule(
            pretrain_epochs=case.pretrain_epochs,
            gradient_scale=case.gradient_scale,
            covariance=case.covariance,
            max_data=case.max_data,
        ),
        steps_per_epoch=case.steps_per_epoch,
        dtype=torch.float64,
        seed=case.rule_seed,
    )


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small only wait for the threads of a pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str, **tolerance) -> None:
    """Fail, naming what differs and by how much."""
    torch.testing.assert_close(
        found, expected, **tolerance, msg=lambda message: f"{what}: {message}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_those_of_version_0_1_0(case):
    found, expected = run_case(case, make_wrapper), VALUES[case.name]
    assert found.keys() == expected.keys()
    # Step by step, and gradients before the weights that they move: the first to differ is named.
    for step in range(case.steps):
        for key, value in expected.items():
            if key == "trunk":  # of the end
                continue
            # Uniform weights, which were in single precision.
            uniform = key.startswith("task_weights/") and step < case.pretraining_steps
            tolerance = {"rtol": 1e-6, "atol": 0} if uniform else CLOSE
            assert_close(found[key][step], value[step], f"{key} of step {step}", **tolerance)
    assert_close(found["trunk"], expected["trunk"], "trunk", **CLOSE)


def test_every_case_has_values():
    assert list(VALUES) == [case.name for case in CASES]

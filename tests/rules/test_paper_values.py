"""The paper's rule gives the numbers it gave before it became an object.

The values in ``paper_values.pt`` were recorded with version 0.1.0 at commit c553599, whose wrapper
took ``rule="paper"`` and the rule's settings itself. They are not to be recorded again: where one
differs, the rule has changed.

One case was: those of ``example_weights`` are of 2026-11-24, since when the weight of an example
counts in the evidence as in the gradients.

Everything random comes from generators of the case's own, in float64 on the CPU: a run depends on
the case alone.
"""

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg import BayesAggWrapper
from bayesagg.rules import PaperRule
from tests.rules.paper_cases import CASES, Case

INPUTS, WIDTH = 4, 5
VALUES = torch.load(Path(__file__).with_name("paper_values.pt"), weights_only=True)
LOSSES = {
    "regression": F.mse_loss,
    "binary": F.binary_cross_entropy_with_logits,
    "multiclass": F.cross_entropy,
}

# Rounding moves the values by a thousandth of this: the runs are short, their trunks smooth.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


randn = functools.partial(torch.randn, dtype=torch.float64)
rand = functools.partial(torch.rand, dtype=torch.float64)


class Net(nn.Module):
    """A smooth trunk and one linear head per task, of parameters that the case's seed gives."""

    def __init__(self, case: Case) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, bias: bool) -> nn.Module:
            if case.layout == "maps":
                return nn.Conv2d(inputs, outputs, 1, bias=bias)
            return nn.Linear(inputs, outputs, bias)

        self.trunk = nn.Sequential(layer(INPUTS, WIDTH, True), nn.Tanh())
        self.heads = nn.ModuleDict(
            {name: layer(WIDTH, head.outputs, head.bias) for name, head in case.heads.items()}
        )
        self.to(torch.float64)
        generator = torch.Generator().manual_seed(case.seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.6 * randn(*parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


def make_wrapper(case: Case, model: Net) -> BayesAggWrapper:
    """A case in the terms of the library."""
    heads = {n: head.kind(model.heads[n], **head.settings) for n, head in case.heads.items()}
    return BayesAggWrapper(
        torch.optim.SGD(model.parameters(), lr=case.lr),
        shared_rep_hook=model.trunk,
        heads=heads,
        rule=PaperRule(**{"pretrain_epochs": 1, "gradient_scale": "sum", **case.rule}),
        steps_per_epoch=case.steps_per_epoch,
        dtype=torch.float64,
        seed=case.rule_seed,
    )


def run_case(case: Case) -> dict[str, Tensor]:
    """Train a case from its beginning.

    Returns tensors in float64, all but the last with the steps as first dimension: ``"gradients"``
    of the trunk, ``[steps, P]``; ``"task_weights/<task>"``, ``[steps, o]``; ``"heads/<task>"``
    after each step, ``[steps, o, D]``, bias last; ``"trunk"`` at the end.
    """
    model = Net(case)
    optimizer = make_wrapper(case, model)
    record: dict[str, list[Tensor]] = {}
    for step in range(case.steps):
        optimizer.zero_grad()
        for part in range(case.accumulate):
            losses, targets = losses_of(case, model, step, step * case.accumulate + part)
            given = targets if case.targets else None
            if part + 1 < case.accumulate:
                optimizer.backward(losses, given)
            else:
                optimizer.step(losses, targets=given)
        found = {"gradients": flat(p.grad for p in model.trunk.parameters())}
        for name, head in model.heads.items():
            found[f"task_weights/{name}"] = optimizer.task_weights[name].double()
            columns = [p.flatten(1) if p.dim() > 1 else p[:, None] for p in head.parameters()]
            found[f"heads/{name}"] = torch.cat(columns, dim=1)
        for key, value in found.items():
            record.setdefault(key, []).append(value.detach().clone())
    result = {key: torch.stack(values) for key, values in record.items()}
    return {**result, "trunk": flat(model.trunk.parameters()).detach()}


def losses_of(
    case: Case, model: Net, step: int, index: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of batch number ``index``, and its targets as the library takes them."""
    size = case.sizes[index % len(case.sizes)]
    generator = torch.Generator().manual_seed(1000 * (case.seed + 1) + index)
    x = randn(size, INPUTS, generator=generator)
    weights = torch.ones(size, dtype=torch.float64)
    if case.weights is not None:
        uniform = rand(size, generator=generator)
        weights = uniform + 0.5 if case.weights == "smooth" else (uniform > 0.3).double()
    outputs, losses, targets = model(shaped(x, case.layout)), {}, {}
    for name, head in case.heads.items():
        # Drawn for absent tasks too: no other draw depends on it.
        y = labels_of(head.kind.kind, head.outputs, size, case.soft, generator)
        per_datum = head.kind.kind == "multiclass"
        kept = rand(*((size,) if per_datum else y.shape), generator=generator) >= case.missing
        kept[index % size] = True  # no task is without any label
        if name in case.absent.get(step, ()):
            continue
        z = outputs[name].movedim(1, -1) if case.layout == "maps" else outputs[name]
        z = z.reshape(size, -1)
        each = LOSSES[head.kind.kind](z[kept], y[kept], reduction="none")
        # An entry of the mask is an output of a datum, or a datum of a multi-class head.
        each = each * weights[kept.nonzero()[:, 0]]
        total = each.mean() if case.reduction == "mean" else each.sum()
        losses[name] = total * case.factors.get(name, 1.0)
        gaps = ~kept if kept.dim() == y.dim() else ~kept[:, None]
        y = y.masked_fill(gaps, torch.nan if y.is_floating_point() else -100)
        targets[name] = shaped(y, case.layout)
    return losses, targets


def labels_of(kind: str, outputs: int, size: int, soft: bool, generator: torch.Generator) -> Tensor:
    if kind == "multiclass" and not soft:
        return torch.randint(outputs, (size,), generator=generator)
    y = randn(size, outputs, generator=generator)
    if kind == "regression":
        return y
    if kind == "binary":
        return torch.sigmoid(2 * y) if soft else (y > 0).double()
    return torch.softmax(2 * y, dim=1)


def shaped(rows: Tensor, layout: str) -> Tensor:
    """Rows ``[N]`` or ``[N, c]`` in the layout of a case."""
    if layout == "rows":
        return rows
    shape = (2, len(rows) // 2) if layout == "tokens" else (2, 2, len(rows) // 4)
    found = rows.view(*shape, *rows.shape[1:])
    return found.movedim(-1, 1) if layout == "maps" and rows.dim() > 1 else found


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_close(found: Tensor, expected: Tensor, what: str, **tolerance) -> None:
    torch.testing.assert_close(
        found, expected, **tolerance, msg=lambda message: f"{what}: {message}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_those_of_version_0_1_0(case):
    found, expected = run_case(case), VALUES[case.name]
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

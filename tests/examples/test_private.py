"""Networks with private layers, and the comparison on them."""

import pytest
import torch

from examples import compare
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import unsuited
from examples.comparison.networks import Experts, PrivateNet, Trunk
from examples.comparison.tasks import Task
from tests.examples.small import KNOWN, run_of

TASKS = (
    Task("a", "regression", "mae"),
    Task("b", "regression", "mae"),
    Task("c", "binary", "auroc"),
    Task("d", "multiclass", "accuracy", classes=3),
)


def test_experts_are_mixed_by_the_gate_of_each_task():
    body, x = Experts(5, (7, 4), tasks=2, experts=3).double(), torch.randn(6, 5).double()
    hidden = torch.nn.functional.elu(body.layers[0](x))
    found = body(x)
    assert [tuple(f.shape) for f in found] == [(6, 4), (6, 4)]
    for task in range(2):
        rows = slice(3 * task, 3 * task + 3)
        gate = (x @ body.gates.weight[rows].T + body.gates.bias[rows]).softmax(1)
        expected = torch.zeros(6, 4).double()
        for e in range(3):
            own = slice(4 * e, 4 * e + 4)
            weight, bias = body.layers[2].weight[own], body.layers[2].bias[own]
            expert = torch.nn.functional.elu(hidden @ weight.T + bias)
            expected += gate[:, e, None] * expert
        assert torch.allclose(found[task], expected)


@pytest.mark.parametrize("body", [Trunk(5, (7, 4), 4), Experts(5, (7, 4), 4)])
def test_every_task_has_a_head_that_no_other_reads(body):
    net = PrivateNet(body, 4, 3, TASKS)
    outputs = net(torch.randn(6, 5))
    assert {n: tuple(o.shape) for n, o in outputs.items()} == {
        "regression": (6, 2),
        "binary": (6, 1),
        "d": (6, 3),
    }
    sizes = {group.name: group.module.out_features for group in net.groups}
    assert sizes == {"a": 1, "b": 1, "c": 1, "d": 3} and [*sizes] == [*"abcd"]
    heads = [p for group in net.groups for p in group.module.parameters()]
    loss = outputs["regression"][:, 1].sum()
    gradients = torch.autograd.grad(loss, heads, materialize_grads=True)
    assert [bool(g.any()) for g in gradients] == [False, False, True, True] + 4 * [False]


@pytest.mark.parametrize("method", ["ls", "si", "si-readout", "bayesagg"])
@pytest.mark.parametrize("name", ["qm9-towers", "qm9-experts"])
def test_the_comparison_trains_them(name, method):
    run = run_of(name, method, 200, epochs=2, batch_size=40, warmup_steps=2)
    assert len(run.test) == 11 and len(run.weights) in (0, 11)


def test_the_single_task_models_are_those_of_the_shared_network():
    parts = {}
    for name in ("qm9", "qm9-towers", "qm9-experts"):
        data = SOURCES[name].load(200, None)
        torch.manual_seed(0)
        parts[name] = list(data.single_task().parameters()), data.test.x, data.test.y
    for found, x, y in parts.values():
        assert torch.equal(x, parts["qm9"][1]) and torch.equal(y, parts["qm9"][2])
        assert all(map(torch.equal, found, parts["qm9"][0]))


def test_methods_that_need_a_common_tensor_are_left_out(tmp_path):
    left_out = [n for n, m in KNOWN.items() if unsuited(m, SOURCES["qm9-towers"])]
    assert {"pcgrad", "mgda-ub", "bayesagg-paper", "ensemble-heads", "rechub-uwl"} <= {*left_out}
    assert not {"ls", "si", "uw", "famo", "igbv2", "si-readout", "bayesagg"} & {*left_out}
    plan = compare.parse_arguments(["qm9-towers", "--output", str(tmp_path)]).plan
    assert "bayesagg" in plan.methods and not {*left_out} & {*plan.methods}

"""The benchmark command: small runs, its report and its errors. No time is judged here."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from examples.benchmark import measuring, methods, networks, parts
from examples.benchmark.__main__ import main
from examples.benchmark.cases import CASES, Case
from examples.comparison.catalogue import methods as catalogue


def _tiny(name: str) -> Case:
    return replace(CASES[name], batch=6, step_batch=6, dim=4, turn=1)


@pytest.mark.parametrize("name", ["mixture", "mmoe_2"])
def test_parts_measure_every_arm(name):
    case = _tiny(name)
    rows = parts.time_rows(case, 1)
    if name == "mixture":  # which has both rules
        rows += parts.memory_rows(case)
    arms = [arm.name for arm in networks.arms(case)]
    assert arms[:3] == ["plain", "likelihood", "likelihood + targets"]
    assert [row.quantity for row in rows if row.part == "time"] == arms
    assert all(row.value > 0 for row in rows if row.part == "time")
    assert all(row.passed for row in rows if row.part == "memory")
    assert parts.markdown(rows).count("\n") == len(rows) + 1


@pytest.mark.parametrize("name", ["regressions", "mixture", "binaries"])
def test_counts_of_a_step_are_within_their_aims(name):
    rows = parts.count_rows(CASES[name])
    assert len(rows) == 8
    missed = [parts.line(row) for row in rows if not row.passed and "paper" not in row.quantity]
    assert not missed, "\n".join(missed)


def test_counts_are_those_of_the_profiler():
    x = torch.ones(3)
    assert measuring.counts(lambda: (x + x) * x) == (2, 0)
    operators, looks = measuring.counts(lambda: x.sum().item())
    assert (operators > 2, looks) == (True, 1)


@pytest.mark.parametrize("name", ["mixture", "mmoe_2"])
@pytest.mark.parametrize("rule", ["likelihood", "paper"])
def test_what_is_measured_is_not_linear_scalarization(name, rule):
    case = _tiny(name)
    if rule not in case.rules:
        pytest.skip("needs one tensor that all heads read")
    step = networks.make_step(case, networks.Arm(rule))
    gradients = []
    for backward in (lambda losses: sum(losses.values()).backward(), step.optimizer.backward):
        step.optimizer.zero_grad()
        backward(step.workload.losses(step.workload.batches[0]))
        own = {id(p) for p in step.workload.model.heads.parameters()}
        shared = [p.grad for p in step.workload.model.parameters() if id(p) not in own]
        gradients.append(torch.cat([gradient.flatten() for gradient in shared]))
    plain, ours = gradients
    assert (ours - plain).norm() > 1e-3 * plain.norm()


def test_one_factorization_serves_all_towers_of_a_kind():
    """In a step of a mixture of experts, as many of them for two tasks as for eleven."""
    found = []
    for name in ("mmoe_2", "mmoe_11"):
        case = replace(CASES[name], step_batch=8)
        run = networks.make_step(case, networks.Arm("likelihood")).run
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(4):
                run()
        calls = {event.key: event.count for event in profiler.key_averages()}
        names = [key for key in calls if "linalg" in key or "cholesky" in key]
        found.append({key: calls[key] for key in names if not key.endswith("norm")})
    assert found[0] == found[1]
    assert 0 < found[0]["aten::linalg_eigh"] <= 2 * 4  # regressions and binary tasks


def test_memory_counts_allocations_exactly():
    """A wider hidden batch costs what its tensors weigh."""

    def peak(batch: int) -> int:
        case = replace(_tiny("regressions"), step_batch=batch)
        return measuring.peak_bytes(lambda: networks.make_step(case, networks.Arm()).run)

    assert peak(1006) - peak(6) >= 1000 * (128 + 128 + 4) * 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # of torch_geometric
@pytest.mark.parametrize("name", CASES)
def test_every_network_gives_one_loss_a_task(name):
    case = replace(CASES[name], step_batch=2)
    workload = networks.make_workload(case)
    x, _ = batch = workload.batches[0]
    losses = workload.losses(batch)
    assert list(losses) == [task.name for task in case.tasks]
    if workload.model.backbone is not None:
        assert workload.model.backbone(x).shape == (2, case.dim)


def test_the_methods_part_trains_the_case_s_own_network():
    case = _tiny("mixture")
    data = methods.benchmark(case)
    assert [task.kind for task in data.tasks] == ["regression"] * 2 + ["binary", "multiclass"]
    x, y = data.train.batch(torch.arange(6))
    losses = data.criterion(data.model()(x), y)
    workload = networks.make_workload(case)
    expected = workload.losses(workload.batches[0])
    torch.testing.assert_close(list(losses.values()), list(expected.values()))


def test_methods_are_measured_in_one_run():
    assert list(methods.chosen(_tiny("mixture"))) == list(catalogue("utkface"))
    names = ["ls", "pcgrad", "bayesagg"]
    rows = methods.method_rows(_tiny("mixture"), 1, names)
    values = {row.quantity: row.value for row in rows}
    assert list(values) == [f"{n} {what}" for n in names for what in ("time", "ratio", "peak")]
    assert values["ls ratio"] == 1
    assert all(values[f"{name} time"] > 0 for name in names)
    # The gradients of all tasks are alive at once.
    shared = methods.benchmark(_tiny("regressions")).model().backbone.parameters()
    assert values["pcgrad peak"] > values["ls peak"] + 2 * 4e-6 * sum(p.numel() for p in shared)


def test_the_methods_of_a_case_have_its_preset():
    ours = methods.chosen(CASES["cifar_mtl"])["bayesagg-paper"]
    assert ours == catalogue("cifar_mtl")["bayesagg-paper"]
    names = ["ls", "uw", "ensemble-networks"]
    assert list(methods.chosen(_tiny("mixture"), names[1:])) == names


def test_interleave_gives_every_arm_its_rounds():
    calls: list[str] = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = measuring.interleave(arms, rounds=range(3), calls={"a": 2}, warmup=0)
    assert "".join(calls) == "aabbaaaab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert measuring.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def test_the_command_writes_json(tmp_path, capsys):
    file = tmp_path / "result.json"
    flags = ["--shapes", "mixture", "--repeats", "1", "--step-batch", "4"]
    flags += ["--threads", str(torch.get_num_threads()), "--methods", "si"]
    assert main([*flags, "--parts", "time", "methods", "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {(row["part"], row["shape"]) for row in content["rows"]} == {
        ("time", "mixture"),
        ("methods", "mixture"),
    }
    names = [row["quantity"].split()[0] for row in content["rows"] if row["part"] == "methods"]
    assert set(names) == {"ls", "si"}
    assert content["setting"]["step batch"] == 4
    assert "| verdict |" in capsys.readouterr().out
    assert main([*flags, "--parts", "methods", "--methods", "sgd"]) == 2
    assert "unknown method 'sgd'" in capsys.readouterr().err


def test_missing_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    threads = str(torch.get_num_threads())
    assert main(["--shapes", "utkface", "--parts", "time", "--threads", threads]) == 2
    assert "pip install timm" in capsys.readouterr().err


def test_help_needs_no_optional_package(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "examples"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("timm", "torch_geometric"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("examples.benchmark.__main__").main(["--help"])
    assert stopped.value.code == 0 and "--shapes" in capsys.readouterr().out

"""The benchmark command: small runs, its report and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from examples.benchmark import methods, models, parts, report, shapes, timing
from examples.benchmark.__main__ import main
from examples.comparison.catalogue import methods as catalogue
from examples.comparison.tasks import criterion


def _tiny(name: str) -> shapes.Shape:
    return replace(shapes.SHAPES[name], batch=6, step_batch=6, dim=4)


@pytest.mark.parametrize("name", ["small", "small_mixture"])
@pytest.mark.parametrize("layout", ["separate", "grouped"])
def test_parts_measure_a_tiny_shape(name, layout):
    grouped = _tiny(name)
    shape = grouped.with_layout(layout)
    rows = [
        *parts.aggregation_rows(grouped, 1, 1000),
        *parts.step_rows(shape, 2),
        *parts.memory_rows(shape, None),
    ]
    values = {(row.part, row.quantity): row.value for row in rows}
    assert values["aggregation", "difference of results"] < 10
    assert values["step", "default ratio"] > 0 and values["step", "paper ratio"] > 0
    assert values["memory", "plain peak"] > 0
    for arm in ("default", "paper"):
        assert abs(values["memory", f"{arm} extra peak of a step"]) < 60
    assert report.markdown(rows).count("\n") == len(rows) + 1


@pytest.mark.parametrize("layout", ["separate", "grouped"])
def test_the_methods_part_trains_the_shape_s_own_network(layout):
    shape = _tiny("small_mixture").with_layout(layout)
    data = methods.benchmark(shape)
    assert [task.kind for task in data.tasks] == ["regression"] * 2 + ["binary", "multiclass"]
    model = data.model()
    assert [group.tasks for group in model.groups] == [
        task.outputs for task in shape.tasks[:-1]
    ] + [1]
    x, y = data.train.batch(torch.arange(6))
    losses = criterion(data.tasks)(model(x), y)
    workload = models.make_workload(shape)
    found = iter(losses.values())
    for task, loss in zip(shape.tasks, workload.losses().values(), strict=True):
        own = [next(found) for _ in range(1 if task.kind == "multiclass" else task.outputs)]
        torch.testing.assert_close(torch.stack(own).mean(), loss)


def test_every_method_is_measured_in_one_run():
    rows = methods.method_rows(_tiny("small_mixture"), 1)
    values = {row.quantity: row.value for row in rows}
    names = list(catalogue("utkface"))
    assert list(values) == [f"{n} {what}" for n in names for what in ("time", "ratio", "peak")]
    assert values["ls ratio"] == 1
    assert all(values[f"{name} time"] > 0 for name in names)
    # The gradients of all tasks are alive at once.
    shared = 4e-6 * sum(
        p.numel() for p in methods.benchmark(_tiny("small")).model().backbone.parameters()
    )
    assert values["pcgrad peak"] > values["ls peak"] + 2 * shared


def test_the_methods_of_a_shape_have_its_preset():
    assert (
        methods.chosen(shapes.SHAPES["cifar_mtl"])["bayesagg-paper"]
        == catalogue("cifar_mtl")["bayesagg-paper"]
    )
    assert list(methods.chosen(_tiny("small"), ["uw", "ensemble-networks"])) == [
        "ls",
        "uw",
        "ensemble-networks",
    ]
    with pytest.raises(ValueError, match="unknown method 'sgd'"):
        methods.chosen(_tiny("small"), ["sgd"])


def test_memory_counts_allocations_exactly():
    """A wider hidden batch costs what its tensors weigh."""
    from examples.benchmark.memory import measure

    small = measure(_tiny("small"), "plain").step_peak
    large = measure(replace(_tiny("small"), step_batch=1006), "plain").step_peak
    assert large - small >= 1000 * (128 + 128 + 4) * 4


def test_separate_heads_keep_the_number_of_tasks():
    shape = shapes.SHAPES["cifar_mtl"].with_layout("separate")
    assert len(shape.tasks) == 20
    assert len({task.name for task in shape.tasks}) == 20
    assert shapes.SHAPES["utkface"].with_layout("separate") == shapes.SHAPES["utkface"]


def test_workloads_are_reproducible():
    first, second = (models.make_workload(_tiny("small_mixture")) for _ in range(2))
    for a, b in zip(first.losses().values(), second.losses().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_cnn_has_the_paper_s_feature_size():
    shape = replace(shapes.SHAPES["cifar_mtl"], step_batch=2)
    workload = models.make_workload(shape)
    assert workload.model.backbone(workload.x).shape == (2, 160)


def test_interleave_gives_every_arm_its_rounds():
    calls: list[str] = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = timing.interleave(arms, rounds=3, calls={"a": 2}, warmup=0)
    assert "".join(calls) == "aabbaaaab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert timing.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def test_command_writes_json_and_markdown(tmp_path, capsys):
    file = tmp_path / "result.json"
    flags = ["--shapes", "small", "--parts", "step", "--repeats", "2", "--threads"]
    assert main([*flags, str(torch.get_num_threads()), "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {row["shape"] for row in content["rows"]} == {"small", "small_mixture"}
    assert "| verdict |" in capsys.readouterr().out
    report.write(tmp_path / "result.md", [report.Row(**content["rows"][0])], content["setting"])
    assert content["rows"][0]["shape"] in (tmp_path / "result.md").read_text()


def test_command_measures_methods_where_they_are_asked_for(tmp_path, capsys):
    file = tmp_path / "methods.json"
    flags = ["--shapes", "small", "--parts", "methods", "--methods", "si", "--repeats", "1"]
    flags += ["--step-batch", "4", "--threads", str(torch.get_num_threads())]
    assert main([*flags, "--output", str(file)]) == 0
    content = json.loads(file.read_text())
    assert {row["quantity"].split()[0] for row in content["rows"]} == {"ls", "si"}
    assert content["setting"]["step batch"] == 4
    assert main([*flags, "--methods", "sgd"]) == 2
    assert "unknown method 'sgd'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shapes", "imagenet"], "invalid choice"),
        (["--repeats", "0"], "not a positive whole number"),
        (["--clock", "cpu", "--threads", "2"], "add --threads 1"),
        (["--output", "result.csv"], "must end in .json or .md"),
        (["--output", "no/such/folder/result.md"], "does not exist"),
    ],
)
def test_bad_arguments_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    threads = str(torch.get_num_threads())
    assert main(["--shapes", "utkface", "--parts", "step", "--threads", threads]) == 2
    assert "pip install torchvision" in capsys.readouterr().err


def test_help_needs_no_optional_package():
    code = (
        "import sys; sys.modules['torchvision'] = sys.modules['torch_geometric'] = None\n"
        "from examples.benchmark.__main__ import main; main(['--help'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--shapes" in run.stdout

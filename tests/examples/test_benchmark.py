"""The benchmark command: small runs, its report and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from examples.benchmark import models, parts, report, shapes, timing
from examples.benchmark.__main__ import main


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
    assert values["step", "ratio"] > 0
    assert values["memory", "plain peak"] > 0
    assert abs(values["memory", "extra peak of a step"]) < 60
    assert report.markdown(rows).count("\n") == len(rows) + 1


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

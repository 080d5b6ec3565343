"""The comparison command: resuming, selection, statistics, files, errors."""

import csv
import importlib.util
import json
import math
import statistics

import pytest
import torch
from scipy import stats

from bayesagg.metrics import delta_m
from examples import compare
from examples import tables as paper_tables
from examples.benchmark import __main__ as benchmark_command
from examples.comparison import arms, pipeline, regimes, runs
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import Method, methods
from examples.comparison.runs import Store
from examples.comparison.search import FURTHEST
from examples.comparison.tasks import (
    primary,
)
from examples.methods import LinearScalarization
from tests.examples.small import compared, content

SMALL = ["nhefs", "--epochs", "2", "--train-size", "120", "--warmup-steps", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    arguments = ["--methods", "ls", "si", "bayesagg", "--seeds", "3", "--trials", "3"]
    arguments += ["--untuned", "bayesagg", "--arm", "uw10", '{"method": "uw", "rate": 10}']
    compared(folder, *SMALL, *arguments)
    return folder, arguments


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_every_method_has_its_trials_and_its_seeds(finished):
    folder, _ = finished
    found = {}
    for run in lines(folder):
        found.setdefault((run["method"], run["identity"]["final"]), []).append(run)
    assert {name for name, _ in found} == {"stl", "ls", "si", "bayesagg", "uw10"}
    for name in ("stl", "ls", "si", "uw10"):
        assert {run["identity"]["training"]["seed"] for run in found[name, False]} == {1000}
        assert not any(run["test"] for run in found[name, False])  # the search never sees it
    assert ("bayesagg", False) not in found
    for (_, final), group in found.items():
        if final:
            assert [run["identity"]["training"]["seed"] for run in group] == [0, 1, 2]
            assert all(len(run["test"]) == 4 for run in group)
    tried = {}
    for name in ("stl", "ls", "si", "uw10"):
        settings = [run["identity"]["training"] for run in found[name, False]]
        tried[name] = [(one["learning_rate"], one["weight_decay"]) for one in settings]
    assert tried["ls"][:3] == tried["si"][:3]
    assert len(set(tried["ls"][:3])) == 3
    for settings in tried.values():
        rates = [rate for rate, _ in settings]
        for k in range(3, len(rates)):  # further trials go beyond those before them
            assert not min(rates[:k]) <= rates[k] <= max(rates[:k])


def test_the_chosen_trial_has_the_lowest_validation_delta_and_is_not_at_the_edge(finished):
    folder, _ = finished
    search = content(folder)["search"]
    for name in ("ls", "si", "uw10"):
        deltas = search[name]["validation_delta_m"]
        number = search[name]["chosen"]
        assert number == deltas.index(min(deltas))
        rates = [
            run["identity"]["training"]["learning_rate"]
            for run in lines(folder)
            if run["method"] == name and not run["identity"]["final"]
        ]
        assert len(rates) == len(deltas) <= 3 + FURTHEST
        assert min(rates) < rates[number] < max(rates) or len(rates) == 3 + FURTHEST
    assert search["bayesagg"] == {
        "chosen": 0,
        "settings": "lr 0.002, wd 0",
        "validation_delta_m": [],
    }


def test_statistics_follow_from_the_csv(finished):
    folder, _ = finished
    with (folder / "results.csv").open() as file:
        records = [r for r in csv.DictReader(file) if r["used_for_delta_m"] == "True"]
    values = {}
    for r in records:
        if r["part"] == "test":
            values.setdefault((r["method"], int(r["seed"])), []).append(float(r["value"]))
    single = torch.tensor([values["stl", seed] for seed in range(3)]).mean(0)
    higher = [False, True, True, True]
    deltas = {
        name: [delta_m(values[name, seed], single, higher) for seed in range(3)]
        for name in ("ls", "si", "bayesagg", "uw10")
    }
    summary = content(folder)["summary"]
    for name, expected in deltas.items():
        assert summary[name]["delta"] == pytest.approx(expected, rel=1e-4)
    raw = {n: stats.ttest_rel(deltas[n], deltas["ls"]).pvalue for n in ("si", "bayesagg", "uw10")}
    smallest = min(raw, key=raw.get)
    assert summary[smallest]["p_values"]["ls"] == pytest.approx(min(1, 3 * raw[smallest]), rel=1e-3)
    assert "p_values" in summary["ls"] and "ls" not in summary["ls"]["p_values"]
    first = records[0]
    assert first["epochs"] == "2" and json.loads(first["method_settings"]) == {}
    assert {r["run"] for r in records} == {
        r["key"] for r in lines(folder) if r["identity"]["final"]
    }


def test_tables_of_the_validation_part_leave_the_test_part_alone(tmp_path):
    arguments = ["--methods", "ls", "si", "--seeds", "2", "--part", "val"]
    summary = compared(tmp_path, *SMALL, *arguments)["summary"]
    found = {(r["method"], r["identity"]["training"]["seed"]): r for r in lines(tmp_path)}
    assert not any(run["test"] for run in found.values())
    tasks = runs.load(runs.Data("nhefs", None, 120)).tasks
    values = {key: primary(tasks, run["val"]) for key, run in found.items()}
    single = [sum(pair) / 2 for pair in zip(values["stl", 0], values["stl", 1], strict=True)]
    higher = [task.higher_is_better for task in tasks]
    expected = [delta_m(values["si", seed], single, higher) for seed in range(2)]
    assert summary["si"]["delta"] == pytest.approx(expected)
    assert "on the validation part" in (tmp_path / "results.md").read_text()


def test_tables_and_figure_are_written(finished):
    folder, _ = finished
    page = (folder / "results.md").read_text()
    for label in ("| LS |", "| SI |", "| BayesAgg |", "| uw10 |", "| STL |"):
        assert label in page
    assert "p against LS" in page and "ECE" in page and "difference to LS" in page
    deltas = {name: entry["delta"] for name, entry in content(folder)["summary"].items()}
    row = next(line for line in page.splitlines() if line.startswith("| SI |")).split(" | ")
    pairs = [a - b for a, b in zip(deltas["si"], deltas["ls"], strict=True)]
    interval = stats.t.interval(0.95, 2, statistics.mean(pairs), stats.sem(pairs))
    low, high = (float(f) for f in (row[2].split(" ± ")))
    assert (low - high, low + high) == pytest.approx(interval, abs=0.011)
    assert "BayesAgg: none, default settings" in page
    for name in ("results.png", "results-calibration.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_errors_are_compared_without_a_yardstick(tmp_path):
    arguments = ["--methods", "ls", "si", "bayesagg", "--reference", "si", "--seeds", "2"]
    size = ["qm9", "--molecules", "600", "--epochs", "2", "--warmup-steps", "1"]
    compared(tmp_path, *size, *arguments)
    logs = {}
    for run in lines(tmp_path):
        own = [math.log(task["mae"]) for task in run["test"]]
        logs.setdefault(run["method"], []).append(statistics.mean(own))
    pairs = [a - b for a, b in zip(logs["ls"], logs["si"], strict=True)]
    interval = stats.t.interval(0.95, 1, statistics.mean(pairs), stats.sem(pairs))
    values = [100 * math.expm1(x) for x in (statistics.mean(pairs), *interval)]
    page = (tmp_path / "results.md").read_text()
    table = page[page.index("| errors over those of SI |") :].splitlines()[2:4]
    row = next(line for line in table if line.startswith("| LS |")).split(" | ")
    assert row[1] == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values)
    assert float(row[2][:5]) == pytest.approx(
        stats.ttest_rel(logs["ls"], logs["si"]).pvalue, abs=1e-3
    )
    assert {line.split(" | ")[0] for line in table} == {"| LS", "| BayesAgg"}
    compared(tmp_path, *size, *arguments[:-1], "1")  # of the same runs: nothing to test with
    page = (tmp_path / "results.md").read_text()
    assert f"| LS | {100 * math.expm1(pairs[0]):+.1f} |  |" in page


def test_a_finished_comparison_is_not_run_again(finished, monkeypatch):
    folder, arguments = finished
    before = (folder / "runs.jsonl").read_text(), content(folder)
    monkeypatch.setattr(pipeline, "run_job", lambda *_: pytest.fail("ran again"))
    again = compared(folder, *SMALL, *arguments)
    assert ((folder / "runs.jsonl").read_text(), again) == before


def test_it_resumes_after_the_last_whole_run(finished, tmp_path, monkeypatch):
    folder, arguments = finished
    text = (folder / "runs.jsonl").read_text()
    count = text.count("\n")
    cut = text[: len(text) - len(text.splitlines()[-1]) // 2]  # stopped while it wrote
    (tmp_path / "runs.jsonl").write_text(cut)
    done = []
    real = pipeline.run_job
    monkeypatch.setattr(pipeline, "run_job", lambda job, tick: done.append(job) or real(job, tick))
    with pytest.warns(UserWarning, match="incomplete"):
        again = compared(tmp_path, *SMALL, *arguments)
    assert len(done) == 1 and len(lines(tmp_path)) == count
    assert again["summary"] == content(folder)["summary"]


@pytest.mark.parametrize(
    "changed",
    [
        *(["--epochs", "3"], ["--batch-size", "32"], ["--clip-norm", "1"], ["--optimizer", "sgd"]),
        *(["--train-size", "130"], ["--learning-rate", "0.003"], ["--warmup-steps", "0"]),
    ],
)
def test_other_settings_never_share_a_run(changed, monkeypatch):
    def keys(arguments):
        plan = compare.parse_arguments([*SMALL, "--methods", "ls", "bayesagg", *arguments]).plan
        jobs = [
            runs.Job(plan.data, name, method, plan.training, final=True)
            for name, method in plan.methods.items()
        ]
        return {runs.key_of(runs.identity(job)) for job in jobs}

    monkeypatch.setattr(compare, "make_folder", lambda *_: None)
    plain, other = keys([]), keys(changed)
    assert keys([]) == plain and len(plain) == 2
    assert not plain & other


@pytest.mark.parametrize(
    ("benchmark", "own"),
    [
        ("nhefs", {"tables.py"}),
        ("qm9-mpnn", {"message_passing.py", "qm9_mpnn.py", "molecules.py"}),
    ],
)
@pytest.mark.parametrize("name", ["ls", "bayesagg"])
def test_runs_depend_on_their_code_and_the_library_s_only_where_it_trains(
    benchmark, own, name, monkeypatch
):
    seen = []
    monkeypatch.setattr(runs, "_hash_files", lambda files: seen.extend(files) or "0")
    method = methods("utkface")[name]
    runs.code_version(runs.Job(runs.Data(benchmark, None, 120), name, method, None, True))
    names = {file.name for file in seen}
    assert ("engine.py" in names) == (name == "bayesagg")
    assert {"training.py", "methods.py", *own} <= names
    assert "catalogue.py" not in names


def test_a_changed_line_is_refused(finished, tmp_path):
    folder, _ = finished
    run = lines(folder)[0]
    run["identity"]["training"]["epochs"] = 99
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n")
    with pytest.raises(ValueError, match="changed by hand"):
        Store(tmp_path / "runs.jsonl")
    (tmp_path / "runs.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="not a run of a comparison"):
        Store(tmp_path / "runs.jsonl")


class Exploding(LinearScalarization):
    def objective(self, values):
        return super().objective(values) * math.nan


def test_a_method_that_diverges_is_reported_and_left_out(tmp_path, monkeypatch, capsys):
    known = methods("utkface")
    broken = {"ls": known["ls"], "uw": Method("UW", Exploding)}
    monkeypatch.setattr(arms, "methods", lambda preset: broken)
    arguments = ["--methods", "ls", "uw", "--seeds", "2", "--trials", "2"]
    found = compared(tmp_path, *SMALL, *arguments)
    assert "failed: 2 of 2 seeds" in capsys.readouterr().out
    assert list(found["summary"]) == ["ls"]
    failures = [run["failure"] for run in lines(tmp_path) if run["method"] == "uw"]
    assert all("DivergedError" in failure for failure in failures)
    assert found["search"]["uw"]["validation_delta_m"][0] is None


COMMANDS = {
    "tables": paper_tables.main,
    "regimes": regimes.main,
    "benchmark": benchmark_command.main,
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "invalid choice: 'cifar'"),
        (["nhefs", "--methods", "ls", "sgd"], "unknown method 'sgd'"),
        (["nhefs", "--methods", "none"], "no methods"),
        (["nhefs", "--untuned", "sgd"], "'sgd' is not among the methods"),
        (["nhefs", "--molecules", "200"], "nhefs has none; see --train-size"),
        (["qm9", "--molecules", "99"], "99 is not a whole number from 100"),
        (["nhefs", "--clip-norm", "-1"], "-1.0 is not a positive number"),
        (["nhefs", "--arm", "a", "{"], "argument --arm: a:"),
        (["nhefs", "--arm", "a", '{"weights": {}}'], "unknown part 'weights'"),
        (["nhefs", "--arm", "a", '{"rule": {"lag": 0}}'], "lag must be an integer"),
        (["nhefs", "--trials", "2", "--learning-rate", "1e-3", "2e-3"], "not several"),
        (["nhefs", "--arm", "ls", "{}"], "'ls' is the name of a method"),
        (["nhefs", "--output", "{file}"], "is a file"),
        (
            ["yeast", "--protocol", "paper"],
            "no published settings for yeast; there are some for: q",
        ),
        (
            ["qm9-towers", "--methods", "ls", "pcgrad"],
            "pcgrad needs a network whose heads all read",
        ),
        (["qm9-mpnn", "--data-dir", "{file}/none"], "there is no folder"),
        (["tables", "8", "--from", "x"], "tables: error: argument N: invalid choice"),
        (["tables", "1"], "tables: error: the following arguments are required"),
        (["regimes", "--lines", "noice"], "invalid choice: 'noice'"),
        (["benchmark", "--shapes", "imagenet"], "invalid choice"),
        (["benchmark", "--repeats", "0"], "0 is not a whole number from 1"),
        (["benchmark", "--clock", "cpu", "--threads", "2"], "add --threads 1"),
        (["benchmark", "--output", "result.csv"], "is not a .json file in a folder that exists"),
        (["benchmark", "--output", "no/folder/result.json"], "in a folder that exists"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    name, *rest = arguments
    main, given = (COMMANDS[name], rest) if name in COMMANDS else (compare.main, arguments)
    with pytest.raises(SystemExit) as stop:
        main([a.replace("{file}", str(tmp_path / "file")) for a in given])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_missing_data_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    runs.load.cache_clear()
    assert compare.main(["yeast", "--output", str(tmp_path)]) == 1
    assert "pip install river" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_costs_are_of_every_method_and_relative_to_ls(tmp_path, monkeypatch):
    arguments = ["--methods", "si", "imtl-g", "bayesagg", "--seeds", "1", "--costs"]
    costs = compared(tmp_path, *SMALL, *arguments)["costs"]
    assert list(costs) == ["ls", "si", "imtl-g", "bayesagg"]
    assert costs["ls"]["ratio"] == 1
    assert all(cost["seconds"] > 0 for cost in costs.values())
    # The tasks' gradients of all shared parameters are alive at once.
    model = SOURCES["nhefs"].load(None, 120).model()
    shared = 4 * sum(p.numel() for p in model.backbone.parameters())
    assert costs["imtl-g"]["peak_bytes"] > costs["ls"]["peak_bytes"] + 3 * shared
    assert "| IMTL-G |" in (tmp_path / "results.md").read_text().split("peak of a step")[1]

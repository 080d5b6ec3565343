"""The demo end to end on a few molecules: what it prints and writes, and its errors."""

import contextlib
import csv
import importlib.util
import io
import json
from types import SimpleNamespace

import pytest
import torch

from bayesagg.metrics import delta_m, mean_rank
from examples import demo
from examples.data import qm9
from examples.jobs import run_jobs
from examples.methods import METHODS, LinearScalarization, ScaleInvariant
from examples.models import MultiTaskNet, SingleTaskNets, mlp
from examples.reporting import SINGLE_TASK, Run, summarise
from examples.training import (
    TrainSettings,
    mean_absolute_errors,
    mean_squared_errors,
    refit_absolute_errors,
    train,
)

TASKS = [target.name for target in qm9.TARGETS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAYESAGG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """The demo run once with all methods: its status, what it printed and where it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed, bar = io.StringIO(), io.StringIO()
    arguments = ["--molecules", "300", "--epochs", "2", "--seeds", "2", "--workers", "1"]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(bar):
        status = demo.main([*arguments, "--output", str(folder)])
    return SimpleNamespace(
        status=status, printed=printed.getvalue(), bar=bar.getvalue(), folder=folder
    )


@pytest.fixture(scope="module")
def data(cache):
    return qm9.load_qm9(300)


def table_lines(printed, first):
    """Cells of the table whose header starts with ``first``; cells are two spaces apart."""
    lines = printed.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    return [
        [cell.strip() for cell in line.split("  ") if cell.strip()]
        for line in [lines[start], *lines[start + 2 : lines.index("", start)]]
    ]


def test_progress_covers_every_epoch(finished):
    assert finished.status == 0
    assert f"{2 * 2 * (1 + len(METHODS))}/{2 * 2 * (1 + len(METHODS))}" in finished.bar


def test_printed_errors_are_those_of_the_files(finished):
    header, *lines = table_lines(finished.printed, "test MAE")
    assert header[1:] == list(demo.LABELS.values())
    assert [line[0] for line in lines] == [f"{t.name} [{t.unit}]" for t in qm9.TARGETS]
    summary = json.loads((finished.folder / "results.json").read_text())["summary"]
    for k, line in enumerate(lines):
        assert line[1:] == [f"{row['test'][k]:.4g}" for row in summary]


def test_printed_summary_follows_from_the_csv(finished):
    with (finished.folder / "results.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == (1 + len(METHODS)) * 2 * len(TASKS)

    def errors(method, seeds=("0", "1")):
        values = [
            [float(r["test"]) for r in records if r["method"] == method and r["seed"] == seed]
            for seed in seeds
        ]
        return torch.tensor(values, dtype=torch.float64).mean(0)

    ranks = mean_rank(torch.stack([errors(method) for method in METHODS]))
    _, single, *lines = table_lines(finished.printed, "method")
    assert single[:3] == ["single-task", "0.0 ± " + single[1].split()[-1], "0.0"]
    for line, method, rank in zip(lines, METHODS, ranks, strict=True):
        deltas = [delta_m(errors(method, seed), errors(SINGLE_TASK)) for seed in "01"]
        assert line[0] == METHODS[method].label
        assert line[1].startswith(f"{sum(deltas) / 2:.1f} ± ")
        assert line[3] == f"{rank:.2f}"
        assert float(line[4]) > 0


def test_effect_of_s_is_reported_for_each_ablation(finished):
    summary = json.loads((finished.folder / "results.json").read_text())["summary"]
    mean = {row["method"]: sum(row["delta"]) / 2 for row in summary}
    for name, method in METHODS.items():
        if method.ablation_of:
            assert f"Effect of s = 0 on {METHODS[method.ablation_of].label}: " in finished.printed
            assert method.settings["s"] == 0 < METHODS[method.ablation_of].settings["s"]
            assert f"-> {mean[name]:.1f} ± " in finished.printed


def test_json_records_every_setting(finished):
    content = json.loads((finished.folder / "results.json").read_text())
    expected = {"molecules": 300, "epochs": 2, "batch_size": 120, "learning_rate": 1e-3}
    assert expected.items() <= content["settings"].items()
    runs = {(run["method"], run["seed"]): run for run in content["runs"]}
    assert set(runs) == {(m, s) for m in (SINGLE_TASK, *METHODS) for s in (0, 1)}
    assert runs["bayesagg-paper", 0]["settings"]["gradient_scale"] == "mean"
    assert runs["bayesagg", 0]["settings"]["gradient_scale"] == "sum"  # the library's default
    assert runs["ls", 0]["test"] != runs["ls", 1]["test"]
    weights = torch.tensor(runs["bayesagg", 0]["weights"])
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert weights[1].std() > 1e-3


def test_figure_is_written_where_it_says(finished):
    path = finished.folder / "demo.png"
    assert str(path) in finished.printed
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width > height > 500


def test_chosen_methods_and_one_epoch(cache, tmp_path, capsys):
    arguments = ["--molecules", "120", "--epochs", "1", "--methods", "si", "bayesagg"]
    assert demo.main([*arguments, "--workers", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    header = table_lines(printed, "test MAE")[0]
    assert header[1:] == ["single-task", "SI", "BayesAgg"]
    assert "no method has left LS" in printed
    assert "Effect of s" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0 is not a whole number from 1"),
        (["--epochs", "ten"], "argument --epochs: 'ten' is not a whole number from 1"),
        (["--seeds", "-1"], "argument --seeds: -1 is not a whole number from 1"),
        (
            ["--molecules", "99"],
            "argument --molecules: 99 is not a whole number from 100 to 130831",
        ),
        (["--molecules", "130832"], "130832 is not a whole number from 100 to 130831"),
        (["--methods", "ls", "sgd"], "argument --methods: invalid choice: 'sgd' (choose from"),
        (["--output", "{file}"], "is a file; name a folder to write into"),
        (["--output", "{file}/below"], "cannot write into"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        demo.main([argument.format(file=tmp_path / "file") for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("python -m examples.demo: error: ")
    assert message in error


def test_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BAYESAGG_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main(["--molecules", "130", "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install qm9pack" in error


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--seeds", "--epochs", "--molecules", "--methods", "--output", "--workers"):
        assert option in text
    assert all(name in text for name in METHODS)


def test_stacked_single_task_networks_train_as_if_alone(data):
    settings = TrainSettings(epochs=3, batch_size=50)
    steps = settings.steps_per_epoch(data)
    networks = [mlp(data.train.x.shape[1], 1) for _ in TASKS]
    together = SingleTaskNets(networks)
    update = LinearScalarization(together, settings, steps)
    train(together, update, data, mean_squared_errors(data.tasks), settings)
    for k in (0, 4, 10):
        alone = networks[k]
        before = alone(data.test.x).detach()
        own = mean_squared_errors(data.tasks[k : k + 1])
        train(
            alone,
            LinearScalarization(alone, settings, steps),
            data,
            lambda outputs, y, k=k, own=own: own(outputs, y[:, k : k + 1]),
            settings,
        )
        after = alone(data.test.x)[:, 0]
        assert (after - before[:, 0]).abs().max() > 0.1
        torch.testing.assert_close(together(data.test.x)[:, k], after, rtol=1e-3, atol=1e-4)


def test_stacking_refuses_layers_it_cannot_stack():
    backbones = [torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)) for _ in "ab"]
    with pytest.raises(TypeError, match="LayerNorm"):
        SingleTaskNets([MultiTaskNet(backbone, 3, 1) for backbone in backbones])


def test_scale_invariant_gradient_is_the_mean_of_relative_gradients():
    model = torch.nn.Linear(1, 1, bias=False)
    settings = TrainSettings(pretrain_epochs=1)
    update = ScaleInvariant(model, settings, steps_per_epoch=1)
    expected = []
    for step in range(2):
        w = model.weight.item()
        losses = {"a": 3 * model.weight.square().sum(), "b": (model.weight + 2).square().sum()}
        sums = [6 * w + 2 * (w + 2), 6 * w / (3 * w * w) + 2 * (w + 2) / (w + 2) ** 2]
        expected.append(sums[step])  # the sum of losses in the first epoch, then of their logs
        update.step(losses)
        assert model.weight.grad.item() == pytest.approx(expected[step], rel=1e-4)
    assert update.task_weights()[0].item() == pytest.approx(1 / (3 * w * w), rel=1e-4)


def test_refit_heads_solve_least_squares(data):
    # Features that hold the targets: a refit head recovers them, the model's own head does not.
    backbone = torch.nn.Linear(data.train.x.shape[1], 300)
    model = MultiTaskNet(backbone, 300, len(TASKS))
    h = torch.cat([backbone(data.train.x), torch.ones(len(data.train.x), 1)], 1).double().detach()
    gram = h.T @ h + torch.eye(301, dtype=torch.float64)
    weights = torch.linalg.solve(gram, h.T @ data.train.y.double())
    fitted = (h @ weights - data.train.y).abs().mean(0) * data.target_scale
    refit = torch.tensor(refit_absolute_errors(model, data, data.train), dtype=torch.float64)
    torch.testing.assert_close(refit, fitted.double(), rtol=1e-3, atol=1e-6)
    own = torch.tensor(mean_absolute_errors(model, data, data.train), dtype=torch.float64)
    assert (refit < own / 2).all()


def test_refit_of_stacked_networks_is_that_of_each(data):
    networks = [mlp(data.train.x.shape[1], 1) for _ in TASKS]
    stacked = refit_absolute_errors(SingleTaskNets(networks), data, data.test)
    shared = [
        refit_absolute_errors(MultiTaskNet(n.backbone, 64, 11), data, data.test) for n in networks
    ]
    expected = [shared[k][k] for k in range(len(TASKS))]
    assert stacked == pytest.approx(expected, rel=1e-3)


def test_summary_compares_with_the_single_task_mean_over_seeds():
    def run(method, seed, value):
        values = [value, value]
        return Run(method, seed, {}, values, values, values, 1.0, 0.1, [[]])

    runs = [
        run(SINGLE_TASK, 0, 1.0),
        run(SINGLE_TASK, 1, 3.0),
        run("ls", 0, 3.0),
        run("ls", 1, 4.0),
    ]
    single, ls = summarise(runs)
    assert single.delta == [-50.0, 50.0]
    assert ls.delta == [50.0, 100.0]
    assert (single.rank, ls.rank) == (None, 1.0)
    assert ls.test == [3.5, 3.5]


def _square(job, tick):
    tick()
    if job < 0:
        raise ValueError("negative")
    return job * job, torch.get_num_threads()


def test_jobs_in_processes_keep_their_order_and_report():
    ticks = []
    results = run_jobs(_square, [3, 1, 2], workers=2, on_tick=lambda: ticks.append(1))
    assert results == [(9, 1), (1, 1), (4, 1)]
    assert len(ticks) == 3


def test_an_error_in_a_job_reaches_the_caller():
    with pytest.raises(ValueError, match="negative"):
        run_jobs(_square, [-1], workers=1, on_tick=lambda: None)

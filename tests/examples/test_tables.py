"""The paper's tables from files of results: their rows, columns, figures and errors."""

import json

import pytest

from examples import compare, tables
from examples.comparison.costs import Cost
from examples.comparison.layouts import LAYOUTS
from tests.examples.small import compared

PAPER_ROWS = [
    *("LS", "SI", "RLW", "DWA", "UW", "MGDA", "PCGrad", "CAGrad", "IMTL-G", "Nash-MTL", "IGBv2"),
    *("Aligned-MTL-UB", "BayesAgg, paper"),
]
NHEFS = ["nhefs", "--epochs", "1", "--train-size", "100", "--seeds", "2", "--costs"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison with all methods, of which method number n takes n hundredths of a second."""
    folder = tmp_path_factory.mktemp("tables")
    own = ["--methods", "all", "ensemble-heads", "--arm", "x", '{"method": "uw", "rate": 3}']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compare,
            "measure_costs",
            lambda chosen, *_: {name: Cost(n / 100, n, 0) for n, name in enumerate(chosen, 1)},
        )
        compared(folder, *NHEFS, *own)
    return folder


def rows(text):
    """Cells of each line of the only table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def table(capsys, *arguments):
    assert tables.main([str(a) for a in arguments]) == 0
    header, _, *body = rows(capsys.readouterr().out)
    return header, body


@pytest.mark.parametrize("number", LAYOUTS)
def test_every_table_has_the_rows_of_the_paper_in_its_order(number, finished, capsys):
    header, body = table(capsys, number, "--from", finished)
    expected = {
        **dict.fromkeys((1, 2), PAPER_ROWS),
        **{n: ["STL", *PAPER_ROWS] for n in (3, 6, 7)},
        4: [
            *PAPER_ROWS[:-2],
            "*Gradients at the representation*",
            *("MGDA-UB", "IMTL-G-UB", "Aligned-MTL-UB", "BayesAgg, paper"),
        ],
        5: ["Ensemble (heads)", "BayesAgg, paper"],
    }
    assert [line[0] for line in body] == expected[number]
    assert {len(line) for line in body} == {len(header)}
    if number in (3, 6, 7):
        assert [title.split(",")[0] for title in header[1:-1]] == [
            *("age", "sex", "race", "education")
        ]
        assert "MAE [years] ↓" in header[1] and "AUROC ↑" in header[3]


def test_other_methods_are_added_where_they_are_asked_for(finished, capsys):
    _, body = table(capsys, 1, "--from", finished, "--all-methods")
    names = [line[0] for line in body]
    assert names[: len(PAPER_ROWS)] == PAPER_ROWS
    assert {"x", "FAMO", "BayesAgg", "Ensemble (heads)"} <= set(names[len(PAPER_ROWS) + 1 :])
    assert "STL" not in names


def test_several_benchmarks_are_columns_of_one_table(finished, tmp_path, capsys):
    small = content({"ls": [0.5, 0.7], "si": [0.25, 0.25]})
    (tmp_path / "results.json").write_text(json.dumps(small))
    header, body = table(capsys, 2, "--from", tmp_path, finished)
    assert header[1:] == ["b, Acc. [%] ↑", "nhefs, Δm [%] ↓"]
    cells = {line[0]: line[1:] for line in body}
    assert cells["LS"][0] == "60.00 ± 14.14" and cells["SI"][0] == "25.00 ± 0.00"
    assert cells["UW"][0] == "–" and "±" in cells["UW"][1]


def content(accuracies, failed=()):
    """What a comparison of these accuracies writes."""

    def run(name, seed, value):
        test = [{"mae": 2.0 + seed}, {"accuracy": value, "ece": 0.1}, {"auroc": value / 2}]
        bad = name in failed
        return {
            "label": name.upper(),
            "test": [] if bad else test,
            "extra": {} if bad else {"accuracy of the best": value},
        }

    runs = {"stl": [0.5, 0.5]} | accuracies
    return {
        "settings": {
            **{"benchmark": "b", "network": "net", "seeds": 2, "trials": 1, "epochs": 3},
            **{"batch_size": 8, "data": {"package": "p 1"}},
        },
        "tasks": [
            {"name": "r", "metric": "mae", "unit": "eV"},
            {"name": "a", "metric": "accuracy", "unit": ""},
            {"name": "b", "metric": "auroc", "unit": ""},
        ],
        "summary": {n: {"delta": [1.0, -2.0]} for n in accuracies if n not in failed},
        "costs": {},
        "runs": {n: [run(n, s, v) for s, v in enumerate(values)] for n, values in runs.items()},
    }


def test_figures_are_means_and_deviations_over_the_seeds(tmp_path, capsys):
    (tmp_path / "results.json").write_text(
        json.dumps(content({"ls": [0.5, 0.7], "uw": [0, 0]}, ["uw"]))
    )
    header, body = table(capsys, 3, "--from", tmp_path)
    assert header == ["", "r, MAE [eV] ↓", "a, Acc. [%] ↑", "b, AUROC ↑", "Δm [%] ↓"]
    lines = {line[0]: line[1:] for line in body}
    assert lines["LS"] == ["2.5 ± 0.71", "60.00 ± 14.14", "0.3000 ± 0.0707", "-0.50 ± 2.12"]
    assert lines["STL"][-1] == "–"
    assert lines["UW"] == ["failed"] * 4
    _, body = table(capsys, 6, "--from", tmp_path)
    assert body[1] == ["LS", "2.5", "60.00", "0.3000", "-0.5"]
    _, body = table(capsys, 7, "--from", tmp_path)
    assert body[1] == ["LS", "2.5", "60.00", "0.3000", "-0.50"]
    _, body = table(capsys, 1, "--from", tmp_path)
    assert body == [["LS", "-0.5 ± 2.1"], ["UW", "failed"]]
    tables.main(["1", "--from", str(tmp_path)])
    notes = capsys.readouterr().out
    assert "Not among the results: si, rlw," in notes and "seeds 2" in notes and "p 1" in notes


def test_times_come_from_a_comparison_or_from_the_benchmark(finished, tmp_path, capsys):
    report = {
        "setting": {"torch": "2", "threads": 1, "clock": "wall"},
        "rows": [
            {"part": "step", "shape": "qm9", "quantity": "ratio", "value": 9},
            *(
                {"part": "methods", "shape": shape, "quantity": f"{name} {what}", "value": value}
                for shape in ("qm9", "cifar_mtl")
                for name, seconds, ratio in (("ls", 39.32, 1), ("mgda-ub", 93.52, 2.378))
                for what, value in (("time", seconds), ("ratio", ratio), ("peak", 1.0))
            ),
        ],
    }
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(report))
    header, body = table(capsys, 4, "--from", file, finished)
    first = ["qm9, sec. × 10²", "ratio to LS", "cifar_mtl, sec. × 10²", "ratio to LS"]
    assert header[1:] == [*first, "nhefs, sec. × 10²", "ratio to LS"]
    lines = {line[0]: line[1:] for line in body}
    assert lines["LS"][:4] == ["3.932", "1.00"] * 2 and lines["LS"][5] == "1.00"
    assert lines["MGDA-UB"][:2] == ["9.352", "2.38"]
    assert lines["MGDA"][:2] == ["–", "–"]
    assert lines["MGDA"][4:] == ["8", "8.00"]  # the eighth of the catalogue


def test_latex_has_the_same_cells(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(content({"ls": [0.5, 0.7]})))
    assert tables.main(["1", "--latex", "--from", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == r"\begin{tabular}{lr}"
    assert r" & b, $\Delta$m [\%] $\downarrow$ \\" in lines
    assert r"LS & -0.5 $\pm$ 2.1 \\" in lines


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (1, None, "no such file"),
        (1, "{", "not JSON"),
        (1, "[]", "neither a comparison's results.json"),
        (1, '{"rows": [], "setting": {}}', "needs the results.json of a comparison"),
        (4, json.dumps(content({"ls": [1.0, 1.0]})), "no times of methods"),
    ],
)
def test_a_file_that_does_not_serve_is_named_in_one_line(number, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert tables.main([str(number), "--from", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and str(tmp_path) in error and error.count("\n") == 1

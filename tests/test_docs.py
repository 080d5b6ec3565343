"""The documentation's navigation, its formulas, and what its pages say of the code."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bayesagg.likelihoods.multiclass import _MAX_CLASSES

ROOT = Path(__file__).resolve().parent.parent


def hook(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation(entries, pages):
    config = SimpleNamespace(nav=entries)
    found = [SimpleNamespace(src_uri=page) for page in pages]
    hook("nav").on_files(SimpleNamespace(documentation_pages=lambda: found), config=config)
    return config.nav


def test_patterns_take_pages_in_order_and_once():
    """A section that is empty is left out, and a page that is missing is not."""
    sections = {"How-to": ["how-to/c*.md", "how-to/*"]}, {"None": ["none/*"]}, {"More": ["*"]}
    entries = [{"Home": "index.md"}, *sections, "gone.md"]
    pages = ["how-to/a.md", "index.md", "how-to/c.md", "z.md", "how-to/b.md"]
    assert navigation(entries, pages) == [
        {"Home": "index.md"},
        {"How-to": ["how-to/c.md", "how-to/a.md", "how-to/b.md"]},
        {"More": ["z.md"]},
        "gone.md",
    ]


def settings():
    class Loader(yaml.SafeLoader):
        """Also reads the tags for Python objects that extensions use, as nothing."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def test_every_page_has_its_place():
    docs = ROOT / "docs"
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    nav = navigation(settings()["nav"], pages)
    titles = [next(iter(entry)) for entry in nav]
    assert titles == [
        *("Home", "Get started", "When to use it", "How-to", "Theory"),
        *("Benchmarks", "API", "Changelog", "Contributing"),
    ], "a page that no entry before the last matches"


def rendered(tex):
    pytest.importorskip("latex2mathml")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    content = f'<span class="arithmatex">\\({tex}\\)</span>'
    return hook("mathml").on_page_content(content, page=page)


@pytest.mark.parametrize(
    ("tex", "part"),
    [
        (r"w \sim x", "<mo>&#x0223C;</mo>"),
        (r"\mathbf{1}", 'mathvariant="bold"'),
        (r"\tilde h", '<mover accent="true"><mi>h</mi><mo stretchy="false">&#x002DC;</mo></mover>'),
    ],
)
def test_formulas_become_mathml(tex, part):
    assert rendered(tex).startswith("<math") and part in rendered(tex)


def test_a_formula_that_cannot_be_converted_is_reported(caplog):
    rendered(r"\nosuchcommand x")
    assert "nosuchcommand" in caplog.text


def test_the_tests_that_pages_name_exist():
    named = set()
    for page in (ROOT / "docs").rglob("*.md"):
        named |= set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text("utf-8")))
    assert len(named) > 20
    for file, test in sorted(named):
        path = ROOT / file
        assert path.is_file(), file
        assert not test or f"\ndef {test}(" in path.read_text("utf-8"), f"{file}::{test}"


def test_imports_run_from_the_bottom_of_the_map_to_its_top():
    """And everything of the package is on the map of the code."""
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    table = page.split("## The map of the code")[1].split("\n## ")[0]
    rows = [re.findall(r"`([\w/.]+)`", row) for row in re.findall(r"^\| (`.*?) \|", table, re.M)]
    place = {name: number for number, row in enumerate(rows) for name in row}
    package = ROOT / "bayesagg"
    files = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert files | folders <= place.keys()
    # The second table has folders beside the package.
    assert all((ROOT / name).is_dir() for name in place.keys() - files - folders)
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts
        text = path.read_text(encoding="utf-8")
        for other in re.findall(r"^ *from bayesagg\.(\w+)", text, re.M):
            module = f"{other}/" if f"{other}/" in place else f"{other}.py"
            here = f"{own[0]}/" if len(own) > 1 else own[0]
            assert here == "__init__.py" or place[module] <= place[here], (path.name, other)


def test_the_pages_say_how_many_classes_the_paper_s_curvature_has():
    for page in ("theory.md", "how-to/paper.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        [many] = re.findall(r"\*\*Many classes\.\*\* Above (\d+)", text)
        assert int(many) == _MAX_CLASSES, page

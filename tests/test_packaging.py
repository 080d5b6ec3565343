"""What is shipped, what it pulls in, and what the repository must not mention."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == PROJECT["version"]

    source = (ROOT / "bayesagg" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            assert "__version__" not in names or node.value.value == PROJECT["version"]

    try:
        installed = importlib.metadata.version("bayesagg")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == PROJECT["version"]


def test_the_core_needs_numpy_and_torch_only():
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert names == {"numpy", "torch"}


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert paper["year"] == 2024
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Achituve", "Diamant", "Netzer", "Chechik", "Fetaya"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_carries_types_and_licence(wheel):
    assert "bayesagg/py.typed" in wheel
    assert any(re.fullmatch(r"bayesagg-[\w.]+\.dist-info/licenses/LICENSE", name) for name in wheel)


def test_the_wheel_carries_the_package_and_nothing_else(wheel):
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bayesagg").rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == sources
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"bayesagg"}


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import bayesagg
for module in pkgutil.walk_packages(bayesagg.__path__, "bayesagg."):
    importlib.import_module(module.name)
print(*(name for name in bayesagg.__all__ if not hasattr(bayesagg, name)))
"""


def test_no_import_goes_in_a_circle():
    """Neither those of functions nor those for type checking."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "bayesagg").rglob("*.py")
    }
    imports = {
        name: {
            found if (found := f"{node.module}.{alias.name}") in files else node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for name, path in files.items()
    }
    assert len(imports["bayesagg.engine"]) > 5
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the circle


def test_the_core_imports_without_the_examples_packages():
    blocked = {
        *("accelerate", "chemprop", "lightning", "matplotlib", "pandas", "pytorch_lightning"),
        *("qm9pack", "scipy", "sklearn", "tensorboard", "timm", "torch_geometric"),
        *("torch_rechub", "torchvision", "tqdm", "transformers"),
    }
    result = run(IMPORT_EVERYTHING.format(blocked=blocked))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "", "names in __all__ that the package does not have"


# Spelled so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w./~:>-])(?:/(?:home|root|Users|work|workspace|tmp|mnt|opt|srv)/[\w.-]|[A-Z]:\\+Users\b)"
)
REGISTRY_HOST = re.compile(
    r"\b(?:pypi|pythonhosted|npmjs|conda|anaconda|debian|ubuntu|docker|crates)\.(?:org|com|io)\b",
    re.IGNORECASE,
)


def repository_files():
    """Every file that is or would be committed."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["paths", "hosts"])
def test_the_repository_names_no_machine(pattern):
    literal = re.compile(re.escape(str(ROOT)) + r"\b")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or an archive
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line) or literal.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)

"""The built documentation: complete without a network, no dead link, every public name listed."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.test_notebooks import EPOCHS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

# What a browser fetches by itself, by element.
ASSETS = {"img": "src", "link": "href", "script": "src", "source": "src", "iframe": "src"}
PUBLIC = [
    "bayesagg",
    *(
        f"bayesagg.{module}"
        for module in (
            *("acquisition", "aggregation", "diagnostics", "errors", "lightning", "logging"),
            *("metrics", "moments", "plots", "posterior", "predicting", "presets"),
        )
    ),
]


class Page(HTMLParser):
    """Anchors, links, assets and prose of a page."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.assets, self.prose = set(), set(), set(), []
        self._code = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self._code += tag in {"code", "pre", "script", "style"}
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.add(attrs["href"])
        if attrs.get(ASSETS.get(tag)) and attrs.get("rel") not in {"canonical", "prev", "next"}:
            self.assets.add(attrs[ASSETS[tag]])

    def handle_endtag(self, tag):
        self._code -= tag in {"code", "pre", "script", "style"}

    def handle_data(self, data):
        if not self._code:
            self.prose.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "NO_MKDOCS_2_WARNING": "1",
            "BAYESAGG_NOTEBOOK_EPOCHS": str(EPOCHS),  # those that test_notebooks.py executes
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    # The page for missing pages is served from any depth, so its links start at the root.
    files = [path for path in folder.rglob("*.html") if path.name != "404.html"]
    return {path: Page(path.read_text(encoding="utf-8")) for path in files}


def test_nothing_is_fetched_from_elsewhere(site):
    assert site
    for path, page in site.items():
        assert page.assets, path.name
        for asset in page.assets:
            parts = urlsplit(asset)
            assert not parts.scheme and not parts.netloc, f"{path.name}: {asset}"
            assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: {asset}"
    [folder] = {path.parent for path in site if path.name == "index.html"}
    for sheet in folder.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", text), sheet.name


def test_links_and_anchors_lead_somewhere(site):
    dead = []
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            fragment = unquote(parts.fragment)
            known = target in site and (not fragment or fragment in site[target].anchors)
            if not known and not (target.is_file() and not fragment):
                dead.append(f"{path.name}: {link}")
    assert not dead


def test_no_markup_is_left_in_the_prose(site):
    for path, page in site.items():
        left = re.search(r"\\[a-z]+[{_^]|\$[^$\n]+\$|\.\. \w+::|:\w+:`", "".join(page.prose))
        assert left is None, f"{path.name}: {left[0]}"


def test_every_public_name_is_in_the_reference(site):
    pages = [page for path, page in site.items() if path.name.startswith("api")]
    anchors = {anchor for page in pages for anchor in page.anchors}
    for module in PUBLIC:
        names = importlib.import_module(module).__all__
        missing = [name for name in names if f"{module}.{name}" not in anchors]
        # Type aliases and the like have no docstring to show; they stand in signatures.
        assert set(missing) <= {"GradientScale"}, module

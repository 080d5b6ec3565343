"""The README and the pages say what is so: their code runs, their links lead somewhere."""

import ast
import re
import textwrap
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<mark>```+|~~~+)[ \t]*(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<body>.*?)^(?P=indent)(?P=mark)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?(?P<target>[^)\s>]+)>?[^)]*\)")
_HEADING = re.compile(r"^#{1,6}[ \t]+(?P<title>.+?)[ \t#]*$", re.MULTILINE)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    """The fenced blocks of a language as (line number of the first line, code)."""
    text = path.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("body")) + 1, textwrap.dedent(match["body"]))
        for match in _FENCE.finditer(text)
        if match["language"] == language
    ]


def anchors(path):
    """The fragments that a page's headings can be reached by."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = (match["title"].lower() for match in _HEADING.finditer(text))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title)) for title in titles}


# Lightning's and TensorBoard's own: advice about speed, and what their dependencies deprecate.
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page, "python"):
        # Pushed down to where it stands, so that a traceback shows the page's line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.age = nn.Linear(8, 1)
        self.smoker = nn.Linear(8, 1)

    def forward(self, x):
        h = self.backbone(x)
        return {"age": self.age(h), "smoker": self.smoker(h)}


@pytest.fixture
def diff():
    """The README's diff as the two programs that it stands for."""
    [(_, body)] = blocks(README, "diff")
    lines = body.splitlines()
    assert all(line[:1] in {"", " ", "+", "-"} for line in lines)
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    return before, after


@pytest.fixture
def loop_namespace():
    """What the diff takes for granted: the model, the data, the losses and the imports."""
    import bayesagg

    def batch():
        return torch.randn(6, 4), {
            "age": torch.randn(6, 1),
            "smoker": torch.randint(2, (6, 1)).float(),
        }

    return {
        "torch": torch,
        "model": TwoHeads(),
        "criterion": {"age": nn.MSELoss(), "smoker": nn.BCEWithLogitsLoss()},
        "train_loader": [batch() for _ in range(3)],
        **{name: getattr(bayesagg, name) for name in bayesagg.__all__},
    }


@pytest.mark.parametrize("side", ["before", "after"])
def test_both_sides_of_the_diff_train(diff, loop_namespace, side):
    import bayesagg

    program = diff[side == "after"]
    model = loop_namespace["model"]
    start = [parameter.detach().clone() for parameter in model.backbone.parameters()]
    exec(compile(program, f"README.md ({side})", "exec"), loop_namespace)
    assert isinstance(loop_namespace["optimizer"], bayesagg.BayesAggWrapper) == (side == "after")
    for old, new in zip(start, model.backbone.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_the_diff_changes_two_statements(diff):
    def statements(program):
        [*setup, loop] = ast.parse(program).body
        return {ast.unparse(statement) for statement in [*setup, *loop.body]}

    before, after = map(statements, diff)
    added = {ast.unparse(ast.parse(code).body[0]) for code in after - before}
    assert len(added) == 2
    assert "optimizer.step(losses)" in added


def test_links_of_the_readme_lead_somewhere():
    """Those between pages: ``test_site.py``."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", README.read_text(encoding="utf-8")))
    targets = [match["target"] for match in _LINK.finditer(text)]
    relative = [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]
    assert relative
    for target in relative:
        file, _, fragment = unquote(target).partition("#")
        destination = ROOT / file if file else README
        assert destination.exists(), target
        assert not fragment or fragment in anchors(destination), target

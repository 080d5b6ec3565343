"""The demo end to end on a few molecules: what it prints and draws, and its errors."""

import importlib.util
import re

import pytest
import torch

from bayesagg import LikelihoodRule
from examples import demo
from examples.data import qm9

pytestmark = pytest.mark.usefixtures("cache")


def test_prints_every_property_and_method_and_draws(tmp_path, capsys):
    arguments = ["--molecules", "200", "--epochs", "30", "--output", str(tmp_path / "new" / "out")]
    demo.main(arguments)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert " ".join(lines[0].split()) == "test error single-task LS SI SI, same heads BayesAgg"
    assert [line.split()[0] for line in lines[1:12]] == [target.name for target in qm9.TARGETS]
    deltas = [float(cell) for cell in lines[12].removeprefix("Δm [%]").split()]
    assert deltas[0] == 0 and len(set(deltas)) == 5  # every method goes its own way
    assert all(float(cell) > 0 for cell in lines[13].split()[3:])
    assert "60/60" in captured.err and re.search(r"BayesAgg=-?\d", captured.err)
    png = (tmp_path / "new" / "out" / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20], "big") > 1000


def test_three_arguments_make_the_default_and_all_start_alike(tmp_path):
    args = demo.argparse.Namespace(seed=0, lr=1e-3, epochs=100, molecules=200)
    arms = {name: demo.Arm(name, (5, 3), args) for name in demo.STYLES}
    assert arms["BayesAgg"].update.optimizer.engine.rule == LikelihoodRule()
    x, y = torch.randn(30, 5), torch.randn(30, 3)
    for _ in range(LikelihoodRule.warmup):
        for arm in arms.values():
            arm.step(x, y)
    first, *others = ([p.detach() for p in arm.net.parameters()] for arm in arms.values())
    for other in others:
        torch.testing.assert_close(other, first)
    for _ in range(3):
        for arm in arms.values():
            arm.step(x, y)
    found = torch.stack([arm.net.backbone[0].weight.detach()[0] for arm in arms.values()])
    assert all((a - b).abs().max() > 1e-6 for i, a in enumerate(found) for b in found[:i])


def test_missing_package_or_impossible_size_is_one_line(tmp_path, monkeypatch):
    for arguments in (["--molecules", "5"], ["--molecules", "200000"]):
        with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
            demo.main([*arguments, "--output", str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install qm9pack"):
        demo.main(["--molecules", "130", "--output", str(tmp_path)])

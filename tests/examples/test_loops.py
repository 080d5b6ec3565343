"""The scripts of other packages' loops, on their real data with few steps.

That every loop takes the steps of a plain one, under both rules: ``tests/loops``.
"""

import csv
import importlib
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bayesagg import BayesAggWrapper, RegressionHead
from tests.helpers.states import assert_finite, difference

# Of the clients, about speed, themselves and their own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "loops").glob("*.py"))


def script(name, client=None):
    """The module, where its client is installed."""
    pytest.importorskip(client or name)
    return importlib.import_module(f"examples.loops.{name}")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_enough_to_be_copied(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def falls(losses):
    """The last third is below the first."""
    third = max(len(losses) // 3, 1)
    assert sum(losses[-third:]) < sum(losses[:third]), losses


def logged(folder, column):
    """A column of what Lightning's CSVLogger wrote."""
    [path] = folder.glob("lightning_logs/*/metrics.csv")
    with path.open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_hf_trainer(rule, tmp_path):
    """Missing labels and accumulation; a resumed run ends where the other one does."""
    hf = script("hf_trainer", "transformers")
    args = ["--molecules", "320", "--epochs", "3", "--accumulate", "2", "--rule", rule]
    whole = hf.main([*args, "--output", str(tmp_path / "whole")])
    falls([entry["loss"] for entry in whole.state.log_history if "loss" in entry])
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: p.stat().st_mtime)
    resumed = hf.main([*args, "--output", str(tmp_path / "again"), "--resume", str(first)])
    assert_finite(whole.wrapper.state_dict())
    assert difference(whole.wrapper.state_dict(), resumed.wrapper.state_dict()) is None
    assert difference(whole.model.state_dict(), resumed.model.state_dict()) is None


def test_lightning_module(rule, tmp_path):
    module = script("lightning_module", "lightning")
    args = ["--epochs", "4", "--rule", rule, "--output", str(tmp_path)]
    trainer = module.main(args)
    falls(logged(tmp_path, "loss"))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    engine = trainer.lightning_module.engine
    assert difference(saved["engine._extra_state"], engine.get_extra_state()) is None


@pytest.fixture
def new_accelerator():
    """Its precision is one for the whole process."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("new_accelerator")
@pytest.mark.parametrize(
    ("rule", "options"),
    [("likelihood", ["--accumulate", "2", "--precision", "bf16"]), ("paper", [])],
)
def test_accelerate_loop(rule, options, tmp_path):
    """Two data sets in turn: all four tasks are learned."""
    loop = script("accelerate_loop", "accelerate")
    shared = ["--rule", rule, "--output", str(tmp_path), *options]
    before, after = (loop.main(["--epochs", n, *shared]) for n in ("0", "3"))
    assert all(after[task] < before[task] for task in before), (before, after)


def test_chemprop_mpnn(tmp_path):
    chemprop = script("chemprop_mpnn", "chemprop")
    args = ["--molecules", "200", "--epochs", "3", "--width", "32"]
    trainer = chemprop.main([*args, "--output", str(tmp_path)])
    assert trainer.callback_metrics["test/mse"] < 1.5  # targets have a variance of one
    weights = trainer.lightning_module.engine.task_weights["properties"]
    assert weights.shape == (5,) and weights.sum() == pytest.approx(1)


def test_chemprop_s_own_loss_is_the_plain_one(rule):
    """With its mask of missing labels; the same steps as of a loop with an indexed mean."""
    chemprop = script("chemprop_mpnn", "chemprop")
    args = type("Args", (), {"molecules": 100, "missing": 0.3})
    batches = list(chemprop.loaders(args)[0]) * 30  # sixty steps
    ends = []
    for own in (True, False):
        torch.manual_seed(0)
        model = chemprop.make_model(rule, 16)
        base = torch.optim.SGD(model.parameters(), lr=1e-2)
        if own:
            for index, batch in enumerate(batches):
                base.zero_grad()
                model.training_step(batch, index).backward()
                base.step()
        else:
            head = {"properties": RegressionHead(model.predictor.ffn[-1][-1])}
            wrapper = BayesAggWrapper(base, None, head, rule=rule)
            for graphs, _, _, y, *_ in batches:
                known = y.isfinite()
                loss = F.mse_loss(model(graphs)[known], y[known])
                wrapper.zero_grad()
                wrapper.step({"properties": loss})
        ends.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_rechub_mmoe(tmp_path):
    """Towers of an MMoE, under the default rule; its own losses on its probabilities are read."""
    pytest.importorskip("recbole", reason="MovieLens 100k comes with it")
    rechub = script("rechub_mmoe", "torch_rechub")
    args = ["--ratings", "6000", "--epochs", "3", "--lr", "4e-3", "--output", str(tmp_path)]
    log, (error, auroc) = rechub.main(args)
    assert log[-1][0] < log[0][0] and log[-1][1] < log[0][1]
    assert error < 1.4 and auroc > 0.55


def ranked(rank, port, arguments):
    """Run the script in the environment that torchrun makes."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    script("ddp", "causaldata").main(arguments)


def test_ddp(tmp_path):
    """Two processes end where one does that has all of each batch."""
    ddp = script("ddp", "causaldata")
    args = ["--epochs", "4", "--output"]
    losses = ddp.main([*args, str(tmp_path / "one")])
    assert losses["age"] < 0.9 and losses["sex"] < 0.6
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    fork = multiprocessing.get_context("fork")  # without seconds of imports
    two = [*args, str(tmp_path / "two")]
    processes = [fork.Process(target=ranked, args=(rank, port, two)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()  # where it hangs
    assert [process.exitcode for process in processes] == [0, 0]
    states = [torch.load(tmp_path / n / "checkpoint.pt") for n in ("one", "two")]
    torch.testing.assert_close(*(s["model"] for s in states), rtol=1e-3, atol=1e-4)


def test_timm_images(capsys):
    images = script("timm_images", "timm")
    images.main(["--images", "400", "--epochs", "3"])
    lines = capsys.readouterr().out.splitlines()
    falls([float(line.split()[-1]) for line in lines if line.startswith("epoch")])

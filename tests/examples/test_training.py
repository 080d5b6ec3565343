"""The loop of the examples: schedules, the epoch that is evaluated, early stopping, protocols."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples import compare
from examples.comparison.benchmark import validation_scores
from examples.comparison.benchmarks import SOURCES
from examples.comparison.catalogue import methods
from examples.comparison.networks import single_task
from examples.comparison.tasks import Task, criterion
from examples.methods import LinearScalarization
from examples.training import DivergedError, TrainSettings, train
from tests.examples.small import compared, made_up

TASKS = (
    Task("r0", "regression", "mae"),
    Task("r1", "regression", "mae"),
    Task("b0", "binary", "accuracy"),
)
SETTINGS = TrainSettings(epochs=10, warmup_steps=3, batch_size=20, learning_rate=0.1)


@pytest.fixture(scope="module")
def data():
    return made_up(TASKS, [60, 30, 30])


def run(data, settings, scores=None, model=None, method=LinearScalarization, **own):
    """Train; returns the model, the history, and learning rate and parameters of each epoch."""
    torch.manual_seed(settings.seed)
    model = model or data.model()
    update = method(model, settings, settings.steps_per_epoch(data), **own)
    rates, states = [], []

    def note():
        rates.append(update.optimizer.param_groups[0]["lr"])
        states.append([value.clone() for value in model.state_dict().values()])

    called = []
    given = None if scores is None else lambda: called.append(1) or scores(len(called))
    history = train(model, update, data, criterion(TASKS), settings, note, given)
    return model, history, rates, states, len(called)


def same(model, state):
    return all(map(torch.equal, model.state_dict().values(), state))


def falling(epoch):
    return [1.0 / epoch] * 3


def test_defaults_never_look_at_the_validation_part(data):
    model, history, rates, states, calls = run(data, SETTINGS, lambda _: pytest.fail("looked"))
    assert calls == 0
    assert history.evaluated == [10] and same(model, states[-1])
    plain = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(plain, T_max=30)
    expected = []
    for step in range(1, 31):
        plain.step()
        cosine.step()
        if step % 3 == 0:
            expected.append(plain.param_groups[0]["lr"])
    assert rates == pytest.approx(expected)
    assert SETTINGS.schedule == "cosine" and not SETTINGS.needs_scores


# Noted at the end of each epoch, for the next: epochs 7 and 9 are the first at lower rates.
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("steps", [0.1] * 5 + [0.01] * 2 + [0.001] * 3),
        ("half", [0.1] * 4 + [0.05] * 6),
        ("constant", [0.1] * 10),
    ],
)
def test_the_rate_drops_after_shares_of_the_epochs_or_is_kept(schedule, expected, data):
    _, _, rates, _, calls = run(data, replace(SETTINGS, schedule=schedule))
    assert rates == pytest.approx(expected) and calls == 0


def test_plateau_drops_after_more_than_five_epochs_without_a_lower_score(data):
    settings = replace(SETTINGS, schedule="plateau", epochs=16)
    _, _, rates, _, calls = run(data, settings, lambda epoch: [0.0, -5.0, -5.0 - 1e-5 * epoch])
    assert calls == 16
    assert rates == pytest.approx([0.1] * 6 + [0.07] * 6 + [0.049] * 4)
    assert run(data, settings, falling)[2] == pytest.approx([0.1] * 16)
    # Negative scores fall too, and a rise that leaves the mean as it is counts as none.
    assert run(data, settings, lambda epoch: [-1.0 * epoch, 0, 0])[2] == pytest.approx([0.1] * 16)
    # It ends at the smallest rate.
    settings = replace(SETTINGS, schedule="plateau", epochs=30, learning_rate=1.2e-5)
    assert run(data, settings, lambda _: [1.0])[2][-1] == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["bayesagg", "uw"])
def test_every_schedule_takes_every_optimizer(name, data):
    method = methods("utkface")[name]
    for schedule in ("steps", "plateau"):
        settings = replace(SETTINGS, schedule=schedule, selection="best", epochs=4)
        model, history, _, states, _ = run(
            data,
            settings,
            lambda epoch: [abs(epoch - 3.0)] * 3,
            method=method.update,
            **method.settings,
        )
        assert history.evaluated == [3] and same(model, states[2])


def test_the_best_epoch_is_evaluated_by_the_mean_over_tasks(data):
    scores = [[3.0, 0, 0], [1, 1, 0.5], [0, 0, 4], [1, 1, 0.5]]
    settings = replace(SETTINGS, epochs=4, selection="best")
    model, history, _, states, _ = run(data, settings, lambda epoch: scores[epoch - 1])
    assert history.evaluated == [2] and same(model, states[1]) and not same(model, states[3])
    last, _, _, others, _ = run(data, replace(settings, selection="last"))
    assert same(last, others[3])
    # The steps are the same whatever is evaluated.
    assert all(map(torch.equal, states[3], others[3]))


def test_each_single_task_network_has_its_own_best_epoch(data):
    settings = replace(SETTINGS, epochs=4, selection="best")
    best, model = [2, 4, 1], single_task(5, (6, 4), TASKS)
    model, history, _, states, _ = run(
        data, settings, lambda epoch: [abs(epoch - b) for b in best], model=model
    )
    assert history.evaluated == best
    for place, (name, value) in enumerate(model.state_dict().items()):
        network = int(name.split(".")[1])
        equal = [epoch for epoch, state in enumerate(states, 1) if state[place].equal(value)]
        assert equal == [best[network]], name


@pytest.mark.parametrize("selection", ["best", "last"])
def test_patience_stops(selection, data):
    settings = replace(SETTINGS, selection=selection, patience=3)
    scores = [5.0, 4, 4.5, 4, 4.1, 1, 1, 1, 1, 1]
    model, history, _, states, calls = run(data, settings, lambda epoch: [scores[epoch - 1]])
    assert calls == len(states) == len(history.weights) == 5  # not lower in epochs 3 to 5
    assert history.evaluated == ([2] if selection == "best" else [5])
    assert same(model, states[1 if selection == "best" else 4])
    # Of independent networks the last one to improve decides.
    settings = replace(settings, patience=2)
    single = single_task(5, (6, 4), TASKS)
    _, history, _, states, _ = run(data, settings, lambda e: [1, 1, abs(e - 4)], model=single)
    assert len(states) == 6


def test_scores_that_are_no_numbers_are_never_the_best(data):
    settings = replace(SETTINGS, epochs=3, selection="best")
    history = run(data, settings, lambda epoch: [math.nan if epoch != 2 else 9.0])[1]
    assert history.evaluated == [2]
    with pytest.raises(DivergedError, match="no epoch"):
        run(data, settings, lambda _: [math.nan])


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "linear"}, {"selection": "first"}, {"patience": 0}, {"optimizer": "lbfgs"}],
)
def test_settings_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SETTINGS, **wrong)


def test_settings_that_need_scores_say_so(data):
    for settings in ({"schedule": "plateau"}, {"selection": "best"}, {"patience": 2}):
        with pytest.raises(ValueError, match="pass scores="):
            run(data, replace(SETTINGS, **settings))


def test_scores_are_logarithms_of_the_validation_metrics(data):
    model = data.model()
    scores = validation_scores(model, data)
    outputs = model(data.val.x)
    error = (outputs["regression"] - data.val.y[:, :2]).abs().mean(0) * data.scale[:2]
    right = ((outputs["binary"][:, 0] > 0) == data.val.y[:, 2].bool()).double().mean()
    expected = [*error.log().tolist(), -right.log().item()]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not model.training
    perfect = replace(
        data, val=replace(data.val, y=data.val.y * 0 + F.one_hot(torch.tensor(2), 3))
    )  # accuracy of what says no is 0
    with torch.no_grad():
        model.heads["binary"].weight.zero_()
        model.heads["binary"].bias.fill_(-1)
    assert validation_scores(model, perfect)[2] == pytest.approx(-math.log(1e-12))


# --- the command's protocols ---------------------------------------------------------------------

PAPER = TrainSettings(
    epochs=2, warmup_steps=0, batch_size=64, schedule="steps", selection="best", patience=1
)


@pytest.fixture
def with_paper(monkeypatch):
    monkeypatch.setitem(SOURCES, "nhefs", replace(SOURCES["nhefs"], paper=PAPER))


def parse(tmp_path, *arguments):
    return compare.parse_arguments([*arguments, "--methods", "ls", "--output", str(tmp_path)]).plan


def test_the_protocol_chooses_settings_and_size(tmp_path, with_paper):
    small = parse(tmp_path, "nhefs").training
    assert small == SOURCES["nhefs"].settings and small.warmup_steps == 50
    assert parse(tmp_path, "nhefs", "--protocol", "paper").training == PAPER
    changed = parse(tmp_path, "nhefs", "--protocol", "paper", "--epochs", "7").training
    assert changed == replace(PAPER, epochs=7)
    plan = parse(tmp_path, "qm9-mpnn", "--protocol", "paper")
    assert plan.data.size == 130_831
    assert plan.training.schedule == "plateau" and plan.training.selection == "best"
    assert (plan.training.epochs, plan.training.warmup_steps) == (300, 50)
    assert (plan.training.batch_size, plan.training.learning_rate) == (120, 1e-3)
    fewer = parse(tmp_path, "qm9-mpnn", "--protocol", "paper", "--molecules", "500")
    assert fewer.data.size == 500
    assert parse(tmp_path, "qm9-mpnn").data.size == SOURCES["qm9-mpnn"].size


def test_a_comparison_by_another_protocol(tmp_path, with_paper):
    arguments = ["nhefs", "--protocol", "paper", "--train-size", "60", "--seeds", "1"]
    compared(tmp_path, *arguments, "--methods", "ls")
    page = (tmp_path / "results.md").read_text()
    assert "after 60 % and 80 % of the epochs" in page and "lowest validation score" in page
    assert "- patience: 1" in page

"""Task weights in TensorBoard, without Lightning."""

from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bayesagg.logging import log_task_weights, task_weight_scalars
from tests.helpers.nets import make_net
from tests.helpers.settings import SAMPLED
from tests.helpers.training import train, wrap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_weights_as_scalars(rule, device, dtype):
    """By task, and by output where a head has several; engine and wrapper alike."""
    net = make_net(device, dtype)
    optimizer = wrap(net, "adam", rule, settings=SAMPLED)
    train(net, optimizer, 5)
    scalars = task_weight_scalars(optimizer, prefix="w/")
    assert list(scalars) == ["w/reg/0", "w/reg/1", "w/bin/0", "w/bin/1", "w/cls"]
    assert sum(scalars.values()) == pytest.approx(1)
    assert scalars["w/reg/1"] == float(optimizer.task_weights["reg"][1])
    assert scalars == task_weight_scalars(optimizer.engine, prefix="w/")


def test_weights_in_tensorboard(rule, tmp_path, device, dtype):
    net = make_net(device, dtype)
    optimizer = wrap(net, "adam", rule, settings=SAMPLED)
    expected = []
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(6):
            train(net, optimizer, [step])
            log_task_weights(writer, optimizer, step)
            expected.append(task_weight_scalars(optimizer)["task_weights/cls"])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = events.Scalars("task_weights/cls")
    assert [event.step for event in found] == list(range(6))
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor([e.value for e in found]), torch.tensor(expected))


def test_an_output_under_the_name_of_a_task_is_refused():
    """One of the two would be lost."""
    weights = {"a": torch.tensor([0.2, 0.3]), "a/0": torch.tensor([0.5])}
    with pytest.raises(ValueError, match=r"'task_weights/a/0'.*Rename"):
        task_weight_scalars(SimpleNamespace(task_weights=weights))

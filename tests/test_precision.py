"""With ``dtype=torch.float32`` nothing is in double precision, which some devices do not have."""

import traceback

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayesagg import RegressionHead
from bayesagg.arguments import device_of
from bayesagg.errors import PredictionError
from bayesagg.predicting.network import Heads
from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import plain_net
from tests.helpers.settings import EPOCH
from tests.helpers.training import wrap

# Constants are made on the CPU in double precision and moved in the dtype that is asked for.
CONSTANTS = "moments/nodes.py"


class Doubles(TorchDispatchMode):
    """Where the library makes tensors in double precision."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        some = out if isinstance(out, tuple | list) else [out]
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in some):
            files = [frame.filename for frame in traceback.extract_stack()]
            if not any(CONSTANTS in file.replace("\\", "/") for file in files):
                self.found.add((str(function), *[f for f in files if "bayesagg" in f][-1:]))
        return out


@pytest.mark.parametrize("passed", [False, True], ids=["labels read", "targets"])
def test_training_and_predictions_of_means_are_not_in_double_precision(rule, passed):
    net = plain_net(dtype=torch.float32)
    optimizer = wrap(net, rule=rule, dtype=torch.float32)
    batches = [make_batch(dtype=torch.float32, seed=step) for step in range(3 * EPOCH)]
    with Doubles() as doubles:
        for x, labels in batches:
            optimizer.zero_grad()
            losses = make_losses(net(x), labels)
            optimizer.step(losses, targets=labels if passed else None)
        prediction = optimizer.predictor(net)(x)["reg"]
        assert prediction.mean.dtype == prediction.stddev.dtype == torch.float32
        optimizer.load_state_dict(optimizer.state_dict())
    assert doubles.found == set()
    with Doubles() as doubles:
        torch.zeros(1).double()
    assert doubles.found


class OnMps(torch.Tensor):
    """Says that it is on a device that no machine has which runs these tests."""

    device = torch.device("mps")


def test_a_device_without_double_precision_is_told_so():
    there, head = torch.zeros(3, 2).as_subclass(OnMps), nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"MPS.*dtype=torch.float32"):
        device_of({}, [there], torch.float64)
    assert device_of({}, [there], torch.float32).type == "mps"
    heads = Heads(nn.Sequential(head), {"age": RegressionHead(head)})
    with pytest.raises(PredictionError, match=r"'age'.*double precision.*CPU"):
        heads.received({"age": [there]}, "age")

"""A reader, heads and forward passes for tests of reading."""

import torch
from torch import Tensor, nn

from bayesagg.heads import LossTask
from bayesagg.reading import Batch, Call, Capture, Labels, Reader
from bayesagg.reading.check import hooks_of
from tests.helpers.data import LOSSES
from tests.helpers.settings import HEADS


class Bench:
    """Heads on one network, watched, and their reader.

    ``kinds`` is the kind of every head by name, ``outputs`` the number of its outputs.
    """

    def __init__(
        self, kinds, outputs=1, passthrough=(), width=4, dtype=torch.float64, device="cpu"
    ):
        if not isinstance(outputs, dict):
            outputs = dict.fromkeys(kinds, outputs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.modules = {
                name: nn.Linear(width, outputs[name]).to(device, dtype)
                for name, kind in kinds.items()
                if kind != "loss"
            }
        self.kinds, self.width, self.dtype, self.device = kinds, width, dtype, device
        tasks = {
            name: LossTask() if kind == "loss" else HEADS[kind](self.modules[name])
            for name, kind in kinds.items()
        }
        heads = {name: head for name, head in tasks.items() if not isinstance(head, LossTask)}
        self.capture = Capture(heads)
        self.reader = Reader(tasks, passthrough)

    def features(self, rows=8, seed=0) -> Tensor:
        """What a trunk might say."""
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(rows, self.width, generator=generator, dtype=torch.float64)
        return h.to(self.device, self.dtype).requires_grad_()

    def outputs(self, h: Tensor) -> dict[str, Tensor]:
        """A new forward pass; earlier ones are forgotten."""
        self.capture.clear()
        return {name: module(h) for name, module in self.modules.items()}

    def labels(self, out, seed=0) -> dict[str, Tensor]:
        """Of the kind of each head, for outputs of any shape."""
        generator = torch.Generator().manual_seed(seed)
        labels = {}
        for name, z in out.items():
            if self.kinds[name] == "cls":
                y = torch.randint(z.shape[-1], z.shape[:-1], generator=generator)
                labels[name] = y.to(z.device)
            else:
                y = torch.randn(z.shape, generator=generator)
                labels[name] = (y if self.kinds[name] == "reg" else (y > 0)).to(z)
        return labels

    def batch(self, rows=8, seed=0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs of a new forward pass, and labels."""
        out = self.outputs(self.features(rows, seed))
        return out, self.labels(out, seed)

    def losses(self, out, labels, reduction="mean") -> dict[str, Tensor]:
        """The likelihoods."""
        return {n: LOSSES[self.kinds[n]](z, labels[n], reduction=reduction) for n, z in out.items()}

    def read(self, losses, targets=None) -> Batch:
        return self.reader.read(self.capture, losses, targets)

    def step(self, seed=0, given=False, rows=8, reduction="mean"):
        """A likelihood of every head, read: the batch, outputs and labels."""
        out, labels = self.batch(rows, seed)
        batch = self.read(self.losses(out, labels, reduction), labels if given else None)
        return batch, out, labels


def labels_by_task(batch: Batch) -> dict[str, Labels | None]:
    """Labels of every head of a batch."""
    found = {}
    for part in batch.parts:
        for name, columns in part.slices.items():
            found[name] = (
                None if part.labels is None else part.labels.columns(columns.start, columns.stop)
            )
    return found


class Free:
    """Stands in for a capture: one head called "age" whose outputs are given."""

    def __init__(self, kind, out, outputs=None):
        self.head = HEADS[kind](nn.Linear(2, out.shape[-1] if outputs is None else outputs))
        self.out = out
        self.capture = Capture({"age": self.head})
        self.reader = Reader({"age": self.head})
        # The outputs are not those of its weights.
        self.reader._checked["age"] = hooks_of(self.head)

    def read(self, loss, targets=None, out=None) -> Batch:
        out = self.out if out is None else out
        shape = (*out.shape[:-1], 2)
        call = Call(torch.ones(shape).to(out), out, None, (0, out._version))
        self.capture.calls = {"age": [call]}
        given = None if targets is None else {"age": targets}
        return self.reader.read(self.capture, {"age": loss}, given)


def read(kind, out, loss, targets=None) -> Labels | None:
    """What the library makes of a loss at the output of a head called "age"."""
    return labels_by_task(Free(kind, out).read(loss, targets))["age"]

"""A training run for ``test_resume``: ``python -m tests.loops.resumable FOLDER``.

It saves a checkpoint every other step. With half of one on the disk, in the middle of an epoch, it
says so and waits to be killed.
"""

import io
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.data import make_batch, make_losses
from tests.helpers.nets import make_net
from tests.helpers.settings import SAMPLED, WIDTH
from tests.helpers.training import wrap

EPOCHS, STEPS, BATCH, EVERY, HALT = 4, 5, 6, 2, 14
DATA = STEPS * BATCH


class Noisy(nn.Module):
    """A trunk that draws from the global generator in every step."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, WIDTH), nn.BatchNorm1d(WIDTH))

    def forward(self, x):
        return F.dropout(torch.tanh(self.body(x)), 0.3, self.training)


class Run:
    """Everything that a resumed run needs."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = make_net(trunk=Noisy)
        settings = {**SAMPLED, "reg": {"noise_variance": "learned"}}
        kwargs = {"settings": settings, "steps_per_epoch": STEPS, "max_data": 5}
        self.optimizer = wrap(self.net, "adam", "paper", **kwargs)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, gamma=0.5)
        self.step = 0

    def state(self):
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        return {**parts, "random": torch.get_rng_state(), "step": self.step}

    def load(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        self.step = state["step"]

    def parts(self):
        return {"model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, folder, halt_at=None, stop=EPOCHS * STEPS):
        x, labels = make_batch(seed=1, size=DATA)
        while self.step < stop:
            # The order of an epoch follows from its number: the step is the position in the data.
            order = torch.Generator().manual_seed(self.step // STEPS)
            batches = torch.randperm(DATA, generator=order).split(BATCH)
            for index in batches[self.step % STEPS :]:
                losses = make_losses(self.net(x[index]), {n: y[index] for n, y in labels.items()})
                self.optimizer.zero_grad()
                self.optimizer.step(losses)
                self.scheduler.step()
                self.step += 1
                if self.step % EVERY == 0:
                    write(folder / "last.pt", self.state(), self.step == halt_at)
                if self.step == stop:
                    return


def write(path, state, halfway):
    """Under another name first, so that a kill leaves either checkpoint whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    new = path.with_suffix(".new")
    data = buffer.getvalue()
    with new.open("wb") as file:
        if halfway:
            file.write(data[: len(data) // 2])
            file.flush()
            print("halted", flush=True)  # the parent kills this process now
            time.sleep(600)
        file.write(data)
    os.replace(new, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Run().train(Path(sys.argv[1]), HALT)

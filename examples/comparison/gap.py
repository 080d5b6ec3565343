"""IGBv2 (Dai et al., 2023): an agent learns to choose the weights of the log losses."""

from __future__ import annotations

import copy
import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from examples.methods import LinearScalarization
from examples.training import Losses

_BATCH, _CAPACITY = 128, 10_000
_DISCOUNT, _TARGET_RATE = 0.99, 0.005
_TRAIN_EVERY, _UPDATES = 50, 25  # steps between two trainings of the agent, and updates in each
_RANDOM_EPOCHS, _COLLECT_EPOCHS = 5, 3  # with random weights; before the agent is trained


def _network(inputs: int, outputs: int) -> nn.Sequential:
    hidden = nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(128, outputs))


class Agent:
    """Soft actor-critic (Haarnoja et al., 2018); an action is K times a softmax of K logits.

    The logits are Gaussian given the state, and the entropy is theirs.

    Args:
        tasks: K, the dimensions of states and actions.
        rate: Learning rate of actor, critics and temperature.
        seed: Seed of networks and samples.
    """

    def __init__(self, tasks: int, rate: float, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = _network(tasks, 2 * tasks)
            self.critics = nn.ModuleList([_network(2 * tasks, 1) for _ in range(2)])
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self._log_temperature = torch.tensor(math.log(0.2), requires_grad=True)
        groups = (self.actor.parameters(), self.critics.parameters(), [self._log_temperature])
        self._optimizers = [torch.optim.Adam(parameters, lr=rate) for parameters in groups]
        self._memory: deque[tuple[Tensor, Tensor, Tensor, Tensor]] = deque(maxlen=_CAPACITY)
        self._tasks = tasks

    def remember(self, state: Tensor, action: Tensor, reward: Tensor, after: Tensor) -> None:
        """Keep a transition; the oldest makes room."""
        self._memory.append((state, action, reward, after))

    @property
    def experienced(self) -> bool:
        """Whether there is anything to learn from."""
        return bool(self._memory)

    def act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions, which sum to K, for states ``(…, K)``; also the logits' log density."""
        mean, log_std = self.actor(state).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        noise = torch.randn(mean.shape, generator=self._generator)
        action = self._tasks * (mean + log_std.exp() * noise).softmax(-1)
        density = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return action, density

    def learn(self) -> None:
        """One update of critics, actor, temperature and target critics, on remembered data."""
        rows = torch.randint(len(self._memory), (_BATCH,), generator=self._generator)
        parts = zip(*(self._memory[row] for row in rows), strict=True)
        state, action, reward, after = (torch.stack(part) for part in parts)
        temperature = self._log_temperature.exp().detach()
        with torch.no_grad():
            next_action, density = self.act(after)
            worth = self._worth(self.targets, after, next_action).min(0).values
            goal = reward + _DISCOUNT * (worth - temperature * density)
        errors = self._worth(self.critics, state, action) - goal
        self._step(1, errors.square().mean(1).sum())
        chosen, density = self.act(state)
        worth = self._worth(self.critics, state, chosen).min(0).values
        self._step(0, (temperature * density - worth).mean())
        # Towards an entropy of -K.
        self._step(2, -self._log_temperature * (density.detach() - self._tasks).mean())
        with torch.no_grad():
            for new, old in zip(self.critics.parameters(), self.targets.parameters(), strict=True):
                old.lerp_(new, _TARGET_RATE)

    @staticmethod
    def _worth(critics: nn.ModuleList, state: Tensor, action: Tensor) -> Tensor:
        """Both critics' values, shape ``(2, n)``."""
        pair = torch.cat([state, action], -1)
        return torch.stack([critic(pair).squeeze(-1) for critic in critics])

    def _step(self, which: int, loss: Tensor) -> None:
        optimizer = self._optimizers[which]
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()


class ImprovableGapBalancing(LinearScalarization):
    """IGBv2: the sum of w_k log L_k, with weights that are an agent's action.

    The state is the losses, the reward the smallest fall of a loss over a step, in units of the
    task's mean loss in its first epoch. Weights are random in the first epochs (at most a quarter),
    in which the agent starts to learn.

    Args:
        rate: Learning rate of the agent.
    """

    weighted = True

    def __init__(self, *shared: Any, rate: float = 3e-4) -> None:
        super().__init__(*shared)
        self.agent = Agent(self.tasks, rate, self.settings.seed)
        self._generator, self._count = torch.Generator().manual_seed(self.settings.seed), 0
        quarter = self.settings.epochs * self.steps_per_epoch // 4
        self._random_steps = min(_RANDOM_EPOCHS * self.steps_per_epoch, quarter)
        self._collect_steps = min(_COLLECT_EPOCHS * self.steps_per_epoch, quarter)
        self._first: list[Tensor] = []  # losses of the first epoch
        self.base: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None  # losses and weights of the last step

    def step(self, losses: Losses) -> None:
        """Step; the agent learns from what the last step did."""
        now = torch.stack(list(losses.values())).detach()
        if self.base is None:
            self._first.append(now)
            if len(self._first) == self.steps_per_epoch:
                self.base = torch.stack(self._first).mean(0)
        elif self._last is not None:
            before, weights = self._last
            self.agent.remember(before, weights, self.reward(before, now), now)
        super().step(losses)
        self._count += 1
        self._last = (now, self.weights)
        due = self._count > self._collect_steps and self._count % _TRAIN_EVERY == 0
        if due and self.agent.experienced:
            for _ in range(_UPDATES):
                self.agent.learn()

    def reward(self, before: Tensor, now: Tensor) -> Tensor:
        """Smallest fall of a loss between two steps, relative to the first epoch, a scalar."""
        return ((before - now) / self.base).min()

    def objective(self, values: Tensor) -> Tensor:
        """Weighted sum of the log losses."""
        if self._count < self._random_steps or not self.agent.experienced:
            logits = torch.randn(self.tasks, generator=self._generator)
            self.weights = self.tasks * logits.softmax(0)
        else:
            with torch.no_grad():
                self.weights = self.agent.act(values.detach())[0]
        return (self.weights * values.log()).sum()

"""MovieLens 100k, split by time: a film's rating and whether it is liked, by MMoE or PLE."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from examples.comparison import rechub
from examples.comparison.benchmark import Benchmark, Source
from examples.comparison.networks import SeparateNets
from examples.comparison.rechub import RecommenderNet
from examples.comparison.tasks import Task
from examples.data import DataUnavailableError, Split, movielens
from examples.data.movielens import ITEMS, LIKED, USERS, MovieLens, load_movielens
from examples.training import TrainSettings

_TASKS = (Task("rating", "regression", "rmse", "stars"), Task("liked", "binary", "auroc"))
_CATEGORIES = {"user": USERS + 1, "item": ITEMS + 1, "hour": 24, "weekday": 7}
_DIMENSIONS, _EXPERT, _TOWER = 16, 64, 32
_EXPERTS: dict[str, dict[str, Any]] = {
    "MMOE": {"n_expert": 4},
    "PLE": {"n_level": 2, "n_expert_specific": 1, "n_expert_shared": 1},
}


def features(found: MovieLens) -> torch.Tensor:
    """User, film, hour of the day and day of the week (UTC), ``(n, 4)``."""
    hours = found.times // 3600
    return torch.stack([found.users, found.items, hours % 24, hours // 24 % 7], 1)


def load(size: int | None = None, max_train: int | None = None, name: str = "MMOE") -> Benchmark:
    """The first 80 % of the ratings are for training, 10 % each for validation and test.

    The network is a mixture of four experts with a gate and a tower per task, or of the name
    ``PLE``, two levels of an expert per task and a shared one.
    """
    if importlib.util.find_spec("torch_rechub") is None:
        raise DataUnavailableError(
            "the networks are those of the package torch-rechub, which is not installed; "
            "get it with: pip install torch-rechub==0.9.0"
        )
    found = load_movielens()
    tenth = len(found.ratings) // 10
    train, val, test = torch.arange(len(found.ratings)).split([8 * tenth, tenth, tenth])
    train = train[:max_train]
    mean, scale = found.ratings[train].mean(), found.ratings[train].std()
    x = features(found)
    y = torch.stack([(found.ratings - mean) / scale, (found.ratings >= LIKED).float()], 1)
    shape = (name, _CATEGORIES, _DIMENSIONS, _TOWER)
    own = ", ".join(f"{key} {value}" for key, value in _EXPERTS[name].items())
    experts = {"expert_params": {"dims": [_EXPERT]}, **_EXPERTS[name]}
    net = partial(RecommenderNet, *shape, **experts)
    return Benchmark(
        _TASKS,
        *(Split(x[rows], y[rows]) for rows in (train, val, test)),
        scale=torch.stack([scale, torch.ones(())]),
        model=partial(net, _TASKS),
        single_task=partial(SeparateNets.of, _TASKS, net),
        network=f"{name} of torch-rechub ({own}), embeddings of {_DIMENSIONS}, experts of "
        f"{_EXPERT}, towers of {_TOWER}",
        version={
            "package": f"recbole {importlib.metadata.version('recbole')}",
            "torch-rechub": importlib.metadata.version("torch-rechub"),
            "parts": [len(train), len(val), len(test)],
        },
    )


MMOE = Source(
    title="MovieLens 100k, MMoE",
    load=load,
    settings=TrainSettings(epochs=3, batch_size=512, selection="best"),
    preset="utkface",
    common=False,
    code=(rechub, movielens),
)
PLE = replace(MMOE, title="MovieLens 100k, PLE", load=partial(load, name="PLE"))

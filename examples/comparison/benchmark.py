"""What a benchmark is, and how one on a table is made."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.presets import PAPER
from examples.comparison.networks import mlp, single_task
from examples.comparison.statistics import logarithm
from examples.comparison.tasks import Outputs, Task, criterion, measure, primary
from examples.data import Moved, Split
from examples.training import Criterion, Part, TrainSettings, train

_CLIP = 6.0  # standard deviations: rare columns would give inputs of 100
_CHUNK = 4096  # data at once in evaluation, where the part has no number of its own
_WIDTHS = (128, 64)  # of the MLP of changed benchmarks: small, as there are many runs
_SEED = 7  # of mixtures, noise and gaps: the same for all methods and seeds


@dataclass(frozen=True)
class Benchmark:
    """Data, model and measures of an experiment."""

    tasks: tuple[Task, ...]  # tasks, sorted by kind
    train: Part  # training part
    val: Part  # validation part, for selection only
    test: Part  # test part
    scale: Tensor  # what regression targets were divided by, shape ``(K,)``; 1 for the others
    # Makes a multi-task model: it maps inputs to outputs by kind and multi-class task, and has
    # ``backbone``, whose output is the shared representation (``None``: there is none, as the heads
    # read different tensors), and ``groups``, its :class:`HeadGroup`s in the order of the tasks
    model: Callable[[], nn.Module]
    # Makes the single-task models as one module that gives the same outputs, in which no two tasks
    # share a parameter
    single_task: Callable[[], nn.Module]
    network: str  # what the model is, for the record
    version: dict[str, Any]  # what identifies the data: everything they depend on
    # More measures on outputs by head and targets, by name
    extra: dict[str, Callable[[Outputs, Tensor], float]] = field(default_factory=dict)
    # Losses and metrics of dense tasks: the criterion, and the metrics of each task from a model
    # and a part; ``None``: those of the tasks' kinds, of one output per datum
    losses: Criterion | None = None
    evaluate: Callable[[nn.Module, Part], list[dict[str, float]]] | None = None

    @property
    def criterion(self) -> Criterion:
        """Losses by task from outputs by head and targets."""
        return self.losses or criterion(self.tasks)

    @property
    def higher_is_better(self) -> list[bool]:
        """For each task whether a higher value of its metric is better."""
        return [task.higher_is_better for task in self.tasks]

    def to(self, device: str) -> Benchmark:
        """With parts that give their batches on a device."""
        parts = {name: getattr(self, name) for name in ("train", "val", "test")}
        moved = {
            name: part.to(device) if hasattr(part, "to") else Moved(part, device)
            for name, part in parts.items()
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Source:
    """A benchmark by name, before its data are read."""

    title: str  # name in tables and figures
    # Reads the data: takes the size (``None``: the default) and the largest number of training data
    # (``None``: all). Raises ``DataUnavailableError`` where data or a package are not on this
    # computer, and ``DataFileError`` where a file is not what it should be
    load: Callable[[int | None, int | None], Benchmark]
    settings: TrainSettings  # default settings of the training, for small machines
    preset: str  # entry of :data:`bayesagg.presets.PAPER` for the paper's arm
    size: int | None = None  # default size
    size_name: str = ""  # what the size counts; empty where it cannot be chosen
    size_range: tuple[int, int] = (0, 0)  # smallest and largest size
    # The paper's settings, with ``--protocol paper``; ``None``: it has none for this
    paper: TrainSettings | None = None
    # The paper's size, with ``--protocol paper``; ``None``: the default size
    paper_size: int | None = None
    # Whether all heads read one tensor, which some methods need
    common: bool = True
    # Whether outputs are maps, which the ensembles do not take
    dense: bool = False
    # Modules that results depend on, besides that of ``load`` and the shared ones
    code: tuple[ModuleType, ...] = ()


def paper_settings(preset: str, schedule: str) -> TrainSettings:
    """Settings of the training in the paper, from an entry of :data:`bayesagg.presets.PAPER`.

    Args:
        preset: Name of the entry.
        schedule: What its words on the schedule mean, as of :class:`TrainSettings`.
    """
    training = PAPER[preset].training
    same = {name: training[name] for name in ("epochs", "batch_size", "weight_decay")}
    return TrainSettings(learning_rate=training["lr"], schedule=schedule, selection="best", **same)


def trained(data: Benchmark, settings: TrainSettings, update: Callable[..., Any]) -> Any:
    """A network in evaluation mode, and what trained it: an update from model and settings."""
    torch.manual_seed(settings.seed)
    model = data.model()
    method = update(model, settings, settings.steps_per_epoch(data))
    train(model, method, data, data.criterion, settings)
    return model.eval(), method


@torch.no_grad()
def predict(model: nn.Module, part: Part) -> tuple[Outputs, Tensor]:
    """Outputs by head in evaluation mode, and the targets, of a whole part, on the CPU.

    A part of large data says by an attribute ``chunk`` how many of them to take at once.
    """
    model.eval()
    outputs: list[Outputs] = []
    targets: list[Tensor] = []
    for rows in torch.arange(len(part)).split(getattr(part, "chunk", _CHUNK)):
        x, y = part.batch(rows)
        outputs.append({name: output.cpu() for name, output in model(x).items()})
        targets.append(y.cpu())
    return {name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}, torch.cat(targets)


def validation_scores(model: nn.Module, data: Benchmark) -> list[float]:
    """Logarithm of each task's metric on the validation part, negative where higher is better.

    A difference between two epochs is the relative change of the metric, the lower the better; the
    mean over tasks is Δm with the geometric mean in place of the arithmetic one. The single-task
    models, which Δm divides by, are a constant in it, so that no run waits for another's result.
    """
    if data.evaluate:
        measured = data.evaluate(model, data.val)
    else:
        measured = measure(data.tasks, *predict(model, data.val), data.scale)
    return [
        (-1 if task.higher_is_better else 1) * logarithm(value)
        for task, value in zip(data.tasks, primary(data.tasks, measured), strict=True)
    ]


def table_benchmark(
    tasks: Sequence[Task],
    x: Tensor,
    y: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    *,
    widths: Sequence[int],
    version: dict[str, Any],
    package: str,
    max_train: int | None,
    **own: Any,
) -> Benchmark:
    """Make a benchmark of an MLP on a table.

    Inputs and regression targets are standardised on the training part, inputs clipped to ±6
    standard deviations.

    Args:
        tasks: Tasks, sorted by kind.
        x: Inputs, shape ``(n, d)``, float64.
        y: Targets, shape ``(n, K)``, float64, one column per task.
        parts: Rows of the training, validation and test part.
        widths: Layers of the MLP.
        version: What identifies the data besides the package and the sizes of the parts.
        package: The distribution that carries the data.
        max_train: Use that many rows of the training part, the first ones.
        own: Other fields of the :class:`Benchmark`.

    Raises:
        ValueError: If an input or a target is not finite.
    """
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError(f"the table of {package} has values that are not finite")
    train, val, test = parts
    train = train[:max_train]
    x = ((x - x[train].mean(0)) / _spread(x[train])).clamp(-_CLIP, _CLIP).float()
    regression = torch.tensor([task.kind == "regression" for task in tasks])
    scale = torch.where(regression, _spread(y[train]), 1.0)
    y = ((y - torch.where(regression, y[train].mean(0), 0.0)) / scale).float()
    shape: dict[str, Any] = {"inputs": x.shape[1], "widths": widths, "tasks": tasks}
    return Benchmark(
        tuple(tasks),
        *(Split(x[rows], y[rows]) for rows in (train, val, test)),
        scale=scale.float(),
        model=partial(mlp, **shape),
        single_task=partial(single_task, **shape),
        network=f"MLP {'-'.join(map(str, widths))}, ELU, linear heads",
        version={
            "package": f"{package} {importlib.metadata.version(package)}",
            "parts": [len(train), len(val), len(test)],
            "inputs": x.shape[1],
            **version,
        },
        **own,
    )


def _spread(values: Tensor) -> Tensor:
    """Standard deviation of each column, 1 where it is constant."""
    spread = values.std(0)
    return torch.where(spread > 0, spread, 1.0)


def changed(data: Benchmark, change: Mapping[str, float]) -> Benchmark:
    """Change the labels of regressions, for the regimes and an MLP; metrics are in their units.

    Args:
        data: Its targets are standardised.
        change: Of ``tasks``: their number, the first of the benchmark, then random mixtures of two
            of them with standard normal weights. ``scale``: what the labels of every second task
            are multiplied by. ``noise``: standard deviation of what is added to the labels for
            training and validation, the label's own being one. ``missing``: share of the training
            labels that are taken away.
    """
    generator = torch.Generator().manual_seed(_SEED)
    count = int(change.get("tasks", len(data.tasks)))
    parts = [data.train, data.val, data.test]
    targets = _mixed([part.y for part in parts], count, generator)
    if noise := change.get("noise", 0.0):
        drawn = [noise * torch.randn(y.shape, generator=generator) for y in targets[:2]]
        targets[:2] = [y + e for y, e in zip(targets, drawn, strict=False)]
    scale = torch.ones(count)
    scale[1::2] = change.get("scale", 1.0)
    targets = [y * scale for y in targets]
    gaps = torch.rand(targets[0].shape, generator=generator) < change.get("missing", 0.0)
    targets[0][gaps] = torch.nan
    tasks = [replace(task, unit="σ") for task in data.tasks[:count]]
    tasks += [Task(f"mixture {k}", "regression", "mae", "σ") for k in range(len(tasks), count)]
    train, val, test = (Split(part.x, y) for part, y in zip(parts, targets, strict=True))
    return replace(
        data,
        tasks=tuple(tasks),
        train=train,
        val=val,
        test=test,
        scale=1 / scale,
        model=partial(mlp, int(data.version["inputs"]), _WIDTHS, tasks),
        network=f"MLP {'-'.join(map(str, _WIDTHS))}, ELU, linear heads",
        version={**data.version, "change": dict(change)},
    )


def _mixed(targets: list[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """The first targets, and mixtures of two, standardised on the training part."""
    given = targets[0].shape[1]
    if count <= given:
        return [y[:, :count].clone() for y in targets]
    weights = torch.zeros(given, count - given)
    for column in weights.T:
        column[torch.randperm(given, generator=generator)[:2]] = torch.randn(2, generator=generator)
    mixtures = [y @ weights for y in targets]
    mean, spread = mixtures[0].mean(0), mixtures[0].std(0)
    return [torch.cat([y, (m - mean) / spread], 1) for y, m in zip(targets, mixtures, strict=True)]

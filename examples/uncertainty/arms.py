"""What each method believes of the labels of all tasks: the library, laplace-torch and VBLL."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayesagg.predicting import Predictor
from bayesagg.predicting.predictor import PriorVariance
from examples.comparison.benchmark import Benchmark, predict, trained
from examples.comparison.tasks import Task, by_task
from examples.methods import HEADS, LinearScalarization
from examples.training import TrainSettings
from examples.uncertainty.scores import LEVELS, Belief, Beliefs, classified, scores

Part = str  # "train", "val" or "test"


def batches(data: Benchmark, model: Any, part: Part, size: int = 1000) -> list[Any]:
    """A part as pairs of inputs and targets by head."""
    own = getattr(data, part)
    found = []
    for rows in torch.arange(len(own)).split(size):
        x, y = own.batch(rows)
        targets, start = {}, 0
        for group in model.groups:
            columns = y[:, start : start + group.tasks]
            one = columns[:, 0].long() if group.kind == "multiclass" else columns
            targets[group.name], start = one, start + group.tasks
        found.append((x, targets))
    return found


def plain(data: Benchmark, model: nn.Module) -> Callable[[Part], Beliefs]:
    """The network itself; a regression's scale is that of its residuals on the training part."""
    outputs, y = predict(model, data.train)
    columns = zip(data.tasks, by_task(data.tasks, outputs), y.unbind(1), strict=True)
    scales = [
        (z - own).square().mean().sqrt().double() if task.kind == "regression" else None
        for task, z, own in columns
    ]

    def believed(part: Part) -> Beliefs:
        found = by_task(data.tasks, predict(model, getattr(data, part))[0])
        return [
            classified(z) if scale is None else Belief(z.double(), scale.expand_as(z))
            for z, scale in zip(found, scales, strict=True)
        ]

    return believed


def predicted(
    data: Benchmark, model: Any, predictor: Predictor, calibrate: bool = False
) -> Callable[[Part], Beliefs]:
    """This library's; calibrated, where asked for, on the validation part."""
    if calibrate:
        predictor.calibrate(batches(data, model, "val"))

    def believed(part: Part) -> Beliefs:
        predictions, found = predictor(getattr(data, part).x), []
        for group in model.groups:
            p = predictions[group.name]
            if group.kind == "regression":
                halves = torch.stack([p.interval(level)[1] - p.mean for level in LEVELS], 2)
                parts = p.mean.double().T, p.scale.double().T, p.dof.tolist()
                columns = zip(*parts, halves.double().unbind(1), strict=True)
                found += [Belief(*column) for column in columns]
            elif group.kind == "binary":
                found += map(classified, p.distribution.logits.unbind(1))
            else:
                found.append(classified(p.distribution.logits))
        return found

    return believed


def chosen(
    data: Benchmark, model: Any, make: Callable[[PriorVariance], Predictor]
) -> Callable[[Part], Beliefs]:
    """The calibrated predictor of the prior that serves the validation part best."""
    candidates = [
        predicted(data, model, make(prior), True) for prior in (None, "marginal_likelihood")
    ]
    y = data.val.y.double()
    return min(candidates, key=lambda one: scores(data.tasks, one("val"), y)["nll"])


def ours(data: Benchmark, model: Any, method: Any) -> dict[str, Callable[[Part], Beliefs]]:
    """The library's arms on a network that it trained."""

    def exact(prior: PriorVariance = None) -> Predictor:
        part = batches(data, model, "train")
        return method.optimizer.predictor(model, part, prior_variance=prior)

    evidence = method.optimizer.predictor
    return {
        "BayesAgg, network alone": plain(data, model),
        "BayesAgg, evidence": predicted(data, model, evidence(model)),
        "BayesAgg, evidence, calibrated": predicted(data, model, evidence(model), True),
        "BayesAgg, exact": predicted(data, model, exact()),
        "BayesAgg, exact, evidence prior": predicted(data, model, exact("marginal_likelihood")),
        "BayesAgg, exact, calibrated": chosen(data, model, exact),
    }


def on_plain(data: Benchmark, model: Any) -> dict[str, Callable[[Part], Beliefs]]:
    """The library's predictor on a network that it did not train."""
    heads = {group.name: HEADS[group.kind](group.module) for group in model.groups}

    def fit(prior: PriorVariance = None) -> Predictor:
        part = batches(data, model, "train")
        return Predictor.fit(model, heads, part, prior_variance=prior or 0.05)

    return {
        "LS, Predictor.fit": predicted(data, model, fit("marginal_likelihood")),
        "LS, Predictor.fit, calibrated": chosen(data, model, fit),
    }


def package(name: str) -> Any:
    """A library that this comparison needs and the package does not.

    Raises:
        ImportError: that says how to get it.
    """
    import importlib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this arm needs {name}: pip install 'bayesagg[peers]', or leave it out by --only."
        ) from error


@torch.no_grad()
def features(model: Any, data: Benchmark, part: Part) -> Tensor:
    """What the heads read, ``(n, d)``, in float64."""
    return model.backbone(getattr(data, part).x).double()


def laplace(data: Benchmark, model: Any) -> Callable[[Part], Beliefs]:
    """laplace-torch, a model for each task: full covariance, prior and noise by its evidence.

    It knows no binary likelihood: logits ``(-z/2, z/2)`` of two classes stand for one.
    """
    library = package("laplace")
    h = features(model, data, "train")
    columns, fitted = iter(data.train.y.unbind(1)), []
    for group in model.groups:
        both = torch.cat([group.module.weight, group.module.bias[:, None]], 1).detach().double()
        for rows in both.chunk(group.tasks):
            label = next(columns)
            label = label[:, None].double() if group.kind == "regression" else label.long()
            if group.kind == "binary":
                rows = torch.cat([-rows / 2, rows / 2])
            fitted.append(_fit(library, rows, h, label))

    def believed(part: Part) -> Beliefs:
        new = features(model, data, part)
        found = []
        for own, task in zip(fitted, data.tasks, strict=True):
            if task.kind == "regression":
                mean, variance = own(new)
                total = variance[:, 0, 0] + own.sigma_noise.square()
                found.append(Belief(mean[:, 0].detach(), total.sqrt().detach()))
            else:
                found.append(Belief(own(new, link_approx="probit").detach().log()))
        return found

    return believed


def _fit(library: Any, rows: Tensor, h: Tensor, y: Tensor) -> Any:
    """A last layer alone, of weights and biases ``(o, d + 1)``."""
    kind = "regression" if y.is_floating_point() else "classification"
    layer = nn.Linear(h.shape[1], len(rows)).double()
    layer.load_state_dict({"weight": rows[:, :-1], "bias": rows[:, -1]})
    net = nn.Sequential(nn.Identity(), layer)
    own = library.Laplace(net, kind, subset_of_weights="last_layer", hessian_structure="full")
    own.fit(DataLoader(TensorDataset(h, y), batch_size=1024))
    logs = [torch.zeros(1, dtype=torch.float64, requires_grad=True)]
    if kind == "regression":
        logs.append(torch.full((1,), -1.0, dtype=torch.float64, requires_grad=True))
    optimizer = torch.optim.Adam(logs, lr=0.1)
    for _ in range(100):  # as its documentation tunes them
        optimizer.zero_grad()
        loss = -own.log_marginal_likelihood(*(log.exp() for log in logs))
        loss.backward()
        optimizer.step()
    own.prior_precision = logs[0].detach().exp()
    if kind == "regression":
        own.sigma_noise = logs[1].detach().exp()
    return own


class VariationalNet(nn.Module):
    """The benchmark's backbone with a VBLL head for each task, of diagonal covariance.

    With a dense one a step on ten binary tasks takes fifty times that of a plain network.

    Args:
        backbone: of the network.
        width: of what it gives.
        tasks: of the benchmark.
        data: training data, whose number weighs the KL divergence.
    """

    def __init__(self, backbone: nn.Module, width: int, tasks: Sequence[Task], data: int) -> None:
        super().__init__()
        library = package("vbll")
        self.backbone = backbone
        self.heads = nn.ModuleList()
        for task in tasks:
            if task.kind == "regression":
                head = library.Regression(width + 1, 1, 1 / data, "diagonal")
            else:
                classes = 2 if task.kind == "binary" else task.classes
                head = library.DiscClassification(width + 1, classes, 1 / data, "diagonal")
            self.heads.append(head)

    def forward(self, x: Tensor) -> list[Any]:
        h = self.backbone(x)
        h = torch.cat([h, torch.ones_like(h[:, :1])], 1)  # its heads have no bias
        return [head(h) for head in self.heads]


def vbll(data: Benchmark, settings: TrainSettings) -> Callable[[Part], Beliefs]:
    """Trained by the sum of the tasks' bounds, with everything else as for the others."""

    def network() -> VariationalNet:
        plain = data.model()
        width = plain.groups[0].module.in_features
        return VariationalNet(plain.backbone, width, data.tasks, len(data.train))

    def criterion(outputs: list[Any], y: Tensor) -> dict[str, Tensor]:
        found = {}
        for k, (task, out) in enumerate(zip(data.tasks, outputs, strict=True)):
            label = y[:, k : k + 1] if task.kind == "regression" else y[:, k].long()
            found[task.name] = out.train_loss_fn(label)
        return found

    own = replace(data, model=network, losses=criterion)
    model, _ = trained(own, settings, LinearScalarization)

    @torch.no_grad()
    def believed(part: Part) -> Beliefs:
        found = []
        for task, out in zip(data.tasks, model(getattr(data, part).x), strict=True):
            predictive = out.predictive
            if task.kind == "regression":
                mean, scale = predictive.mean[:, 0].double(), predictive.scale[:, 0].double()
                found.append(Belief(mean, scale))
            else:
                found.append(Belief(predictive.probs.double().clamp_min(1e-30).log()))
        return found

    return believed

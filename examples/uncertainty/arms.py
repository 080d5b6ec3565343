"""Networks trained alike, and what each method believes by them of the labels of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesagg.predicting import Predictor
from bayesagg.predicting.predictor import PriorVariance
from examples.comparison.benchmark import Benchmark, predict
from examples.comparison.tasks import Outputs, by_task, criterion
from examples.methods import HEADS, BayesAggregation, LinearScalarization
from examples.training import TrainSettings, train
from examples.uncertainty.scores import LEVELS, Belief, Beliefs, scores

Part = str  # "train", "val" or "test"


def trained(
    data: Benchmark, settings: TrainSettings, update: type[LinearScalarization]
) -> tuple[Any, Any]:
    """A network and what trained it."""
    torch.manual_seed(settings.seed)
    model = data.model()
    method = update(model, settings, settings.steps_per_epoch(data))
    train(model, method, data, criterion(data.tasks), settings)
    return model.eval(), method


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


def targets(data: Benchmark, part: Part) -> Tensor:
    """``(n, K)``."""
    own = getattr(data, part)
    return own.batch(torch.arange(len(own)))[1].double()


def from_outputs(data: Benchmark, outputs: Outputs, scale: Tensor | None) -> Beliefs:
    """A plain network's: probabilities as they are, regressions with one scale a task."""
    found = []
    for k, (task, z) in enumerate(zip(data.tasks, by_task(data.tasks, outputs), strict=True)):
        z = z.double()
        if task.kind == "regression":
            assert scale is not None
            found.append(Belief(z, scale[k].expand_as(z)))
        elif task.kind == "binary":
            found.append(Belief(torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], 1)))
        else:
            found.append(Belief(z.log_softmax(1)))
    return found


def plain(data: Benchmark, model: nn.Module) -> Callable[[Part], Beliefs]:
    """The network itself; a regression's scale is that of its residuals on the training part."""
    outputs, y = predict(model, data.train)
    columns = by_task(data.tasks, outputs)
    error = [
        (z - y[:, k]).square().mean().sqrt() if z.dim() == 1 else torch.tensor(1.0)
        for k, z in enumerate(columns)
    ]
    scale = torch.stack(error).double()

    def believed(part: Part) -> Beliefs:
        return from_outputs(data, predict(model, getattr(data, part))[0], scale)

    return believed


def heads_of(model: Any) -> dict[str, Any]:
    """Descriptions of the heads."""
    return {group.name: HEADS[group.kind](group.module) for group in model.groups}


def predicted(
    data: Benchmark, model: Any, predictor: Predictor, calibrate: bool = False
) -> Callable[[Part], Beliefs]:
    """This library's; calibrated, where asked for, on the validation part."""
    if calibrate:
        predictor.calibrate(batches(data, model, "val"))

    def believed(part: Part) -> Beliefs:
        x = torch.cat([x for x, _ in batches(data, model, part)])
        found: Beliefs = []
        for group in model.groups:
            p = predictor(x)[group.name]
            if group.kind == "regression":
                mean, scale = p.mean.double(), p.scale.double()
                halves = torch.stack([p.interval(level)[1] - p.mean for level in LEVELS], 2)
                for k in range(group.tasks):
                    own = halves[:, k].double()
                    found.append(Belief(mean[:, k], scale[:, k], float(p.dof[k]), own))
            elif group.kind == "binary":
                z = p.distribution.logits.double()
                found += [
                    Belief(torch.stack([F.logsigmoid(-one), F.logsigmoid(one)], 1))
                    for one in z.unbind(1)
                ]
            else:
                found.append(Belief(p.distribution.logits.double().log_softmax(1)))
        return found

    return believed


def chosen(
    data: Benchmark, model: Any, make: Callable[[PriorVariance], Predictor]
) -> Callable[[Part], Beliefs]:
    """The calibrated predictor of the prior that serves the validation part best."""
    candidates = [
        predicted(data, model, make(prior), True) for prior in (None, "marginal_likelihood")
    ]
    y = targets(data, "val")
    return min(candidates, key=lambda one: scores(data.tasks, one("val"), y)["nll"])


def ours(data: Benchmark, model: Any, method: Any) -> dict[str, Callable[[Part], Beliefs]]:
    """The library's arms on a network that it trained."""

    def exact(prior: PriorVariance = None) -> Predictor:
        part = batches(data, model, "train")
        made: Predictor = method.optimizer.predictor(model, part, prior_variance=prior)
        return made

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

    def fit(prior: PriorVariance = None) -> Predictor:
        part = batches(data, model, "train")
        return Predictor.fit(model, heads_of(model), part, prior_variance=prior or 0.05)

    return {
        "LS, Predictor.fit": predicted(data, model, fit("marginal_likelihood")),
        "LS, Predictor.fit, calibrated": chosen(data, model, fit),
    }


__all__ = [
    "BayesAggregation",
    "LinearScalarization",
    "batches",
    "on_plain",
    "ours",
    "plain",
    "targets",
    "trained",
]

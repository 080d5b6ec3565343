"""Networks trained alike, and what each method believes by them of the labels of all tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bayesagg.predicting import Predictor
from bayesagg.predicting.predictor import PriorVariance
from examples.comparison.benchmark import Benchmark, predict
from examples.comparison.tasks import by_task
from examples.methods import HEADS
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
    heads = {group.name: HEADS[group.kind](group.module) for group in model.groups}

    def fit(prior: PriorVariance = None) -> Predictor:
        part = batches(data, model, "train")
        return Predictor.fit(model, heads, part, prior_variance=prior or 0.05)

    return {
        "LS, Predictor.fit": predicted(data, model, fit("marginal_likelihood")),
        "LS, Predictor.fit, calibrated": chosen(data, model, fit),
    }

"""A network and the posteriors of its heads, as one module that predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesagg.errors import CheckpointError, HeadError, PredictionError
from bayesagg.heads import Head, LossTask, check_kinds, named_heads
from bayesagg.predicting.calibration import Calibration
from bayesagg.predicting.classification import MAX_PARAMETERS, laplace
from bayesagg.predicting.data import Source
from bayesagg.predicting.kinds import KINDS
from bayesagg.predicting.network import Heads, check_finite
from bayesagg.predicting.prediction import Prediction
from bayesagg.predicting.regression import Prior, PriorVariance, solve, sums_of
from bayesagg.predicting.state import HeadPosterior, Inferred, Posteriors

__all__ = ["MeanAndStddev", "Predictor", "PriorVariance"]


class Predictor(nn.Module):
    """Predictive distributions of every task by the posteriors of a network's last layers.

    Made by ``optimizer.predictor(model)``, ``optimizer.predictor(model, loader)`` or
    :meth:`fit`. To load one that was saved, build it from the model and the heads alone::

        predictor = Predictor(model, {"age": RegressionHead(model.age)})
        predictor.load_state_dict(torch.load("predictor.pt", weights_only=True))
        p = predictor(x)["age"]

    The network is shared, not copied: train it further, and the posteriors no longer fit it, which
    a warning says. It runs in evaluation mode, whatever mode it is in, and without gradients unless
    asked for.

    Args:
        model: the network; its ``state_dict`` is part of this one's, under ``model.``.
        heads: heads by name, or a sequence of them, of modules of the model.

    Attributes:
        model: the network.
        tasks: names of the heads.
        posteriors: one for each head, in that order.

    Raises:
        HeadError: if a head is no module of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Mapping[str, Head | LossTask] | Sequence[Head | LossTask],
    ) -> None:
        super().__init__()
        named = {n: h for n, h in named_heads(heads).items() if isinstance(h, Head)}
        if not named:
            raise HeadError("`heads` has nothing but LossTask(): no posterior to predict with.")
        check_kinds(named, KINDS, "prediction")
        self._heads = Heads(model, named)
        self.model, self.tasks = model, tuple(named)
        self.posteriors = Posteriors(HeadPosterior(head) for head in named.values())

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        heads: Mapping[str, Head | LossTask] | Sequence[Head | LossTask],
        data: Iterable[Any],
        *,
        prior_variance: PriorVariance = None,
        passes: int = 50,
        max_parameters: int = MAX_PARAMETERS,
    ) -> Predictor:
        """Last-layer posteriors of a network that was trained in any way.

        One pass over the data in evaluation mode. Regressions are solved in closed form, with
        their noise learned unless the head gives it; classifications by Laplace, whose passes run
        on the features of that one, kept up to 512 MiB.

        Args:
            model: the network.
            heads: as of the class.
            data: pairs of inputs and targets by task. Inputs that are tuples are unpacked, dicts
                passed by keyword. ``NaN`` or class -100 marks a missing label.
            prior_variance: γ of the prior ``N(0, γ I)`` of all weights, bias included; in squared
                units of the labels over those of the features. ``"marginal_likelihood"``: learned,
                by output (by head of classes). ``None``: that of each head, or 1, of regressions
                times the mean square of their labels. A number far from the labels warns.
            passes: over the features, to the modes of classifications, at most; too few warn.
            max_parameters: rows of an exact curvature, K D of binary outputs and (C - 1) D of
                classes; beyond, a Kronecker product.

        Raises:
            BayesAggError: a specific subclass for each kind of bad data, which names the task.
        """
        return cls(model, heads)._fit(data, Prior.alone, prior_variance, passes, max_parameters)

    @classmethod
    def of_rule(
        cls,
        model: nn.Module,
        heads: Mapping[str, Head | LossTask],
        rule: object,
        memory: object,
        data: Iterable[Any] | None = None,
        **settings: Any,
    ) -> Predictor:
        """What :meth:`bayesagg.BayesAgg.predictor` returns.

        Raises:
            PredictionError: without data, if a head has no evidence.
            ValueError: without data, for settings of a fit.
            BayesAggError: as of :meth:`fit`.
        """
        predictor = cls(model, heads)
        if data is not None:
            return predictor._fit(data, getattr(rule, "prior_of", Prior.of), **settings)
        if settings:
            raise ValueError(
                f"{', '.join(settings)}: settings of a fit. Pass data too, or leave them out."
            )
        inferred = getattr(rule, "inferred", None)
        if inferred is None:
            raise PredictionError(
                f"{type(rule).__name__} does not say what it inferred of the heads: pass data, as "
                f"in predictor(model, train_loader)."
            )
        found = inferred(memory)
        for name in predictor.tasks:
            if name not in found:
                raise PredictionError(
                    f"task {name!r}: there is no evidence of training for its head. The engine has "
                    f"not been trained yet, or the task's loss is not the head's likelihood; take "
                    f"steps first, or pass data, as in predictor(model, train_loader)."
                )
        return predictor._set(found)

    def forward(
        self, *inputs: Any, differentiable: bool = False, **keywords: Any
    ) -> dict[str, Prediction]:
        """Predictions by task.

        Args:
            inputs: of the network.
            differentiable: keep the graph, for gradients with respect to the inputs.
            keywords: of the network.

        Returns:
            a :class:`~bayesagg.predicting.Prediction` for each task.

        Raises:
            PredictionError: if there is nothing to predict with yet.
            CaptureError: if a head was not used once.
            FeatureError: if what a head received is not finite.
        """
        features = self._features(inputs, keywords, differentiable)
        groups: dict[object, dict[str, HeadPosterior]] = {}
        for name, posterior in self._named():
            head = posterior.head
            # Binary outputs share the quadrature, regressions the product with eigenvectors.
            own = None if head.kind == "binary" else id(posterior.vectors)
            form = head.kind, head.has_bias, head.channels_first, own
            groups.setdefault((id(features[name]), form), {})[name] = posterior
        found: dict[str, Prediction] = {}
        for group in groups.values():
            first = next(iter(group))
            kind = KINDS[group[first].head.kind]
            reading = kind.reading(features[first], list(group.values()))
            found |= {name: kind(reading, place) for place, name in enumerate(group)}
        return {name: found[name] for name in self.tasks}

    def calibrate(self, data: Iterable[Any]) -> Predictor:
        """Fit one number a task to data that were not trained on, by maximum likelihood.

        A regression's predictive scale is multiplied by it, output by output, and the degrees of
        freedom of a Student-t are set to those of its residuals; logits are divided by it, those
        of binary outputs one by one. Intervals of regressions reach to order statistics of the
        residuals (split conformal prediction), so that they hold their share of new labels
        whatever the residuals' distribution. Labels of one class, or that are all predicted right,
        tell no temperature: it is one then, which a warning says.

        Args:
            data: as of :meth:`fit`.

        Returns:
            this predictor, changed.

        Raises:
            BayesAggError: as of :meth:`fit`; nothing has changed then.
        """
        self._check_known()
        calibrations = {name: Calibration(posterior) for name, posterior in self._named()}
        for piece in Source(self.model, self._heads, data, cache=0).pieces():
            for name, rows in piece.items():
                calibrations[name].add(rows)
        for name, calibration in calibrations.items():
            calibration.finish(name)
        return self

    def exportable(self) -> MeanAndStddev:
        """Inputs to ``(mean, stddev)`` by task, for ``torch.export``; leaves the network in eval().

        Raises:
            PredictionError: if there is nothing to predict with yet.
        """
        self._check_known()
        return MeanAndStddev(self)

    def get_extra_state(self) -> dict[str, Any]:
        """Names and kinds of the tasks, to be compared with those of a state."""
        return {"tasks": [[name, p.head.kind] for name, p in self._named()]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Compare the tasks with those of a state.

        Raises:
            CheckpointError: if they differ.
        """
        own = self.get_extra_state()
        if not isinstance(state, dict) or state.get("tasks") != own["tasks"]:
            raise CheckpointError(
                f"the state is not that of a predictor of the tasks {own['tasks']}: build it with "
                f"the heads that it was saved with, in their order."
            )

    def _named(self) -> list[tuple[str, HeadPosterior]]:
        return list(zip(self.tasks, self.posteriors, strict=True))

    def _features(
        self, inputs: tuple[Any, ...], keywords: dict[str, Any], differentiable: bool
    ) -> dict[str, Tensor]:
        self._check_known()
        with torch.set_grad_enabled(differentiable), self._heads.watched(self.model) as seen:
            self.model(*inputs, **keywords)
        found = {name: self._heads.received(seen, name) for name in self.tasks}
        if not torch.compiler.is_compiling():
            self.posteriors.check_fit(self.tasks)
            for name, features in {id(h): (n, h) for n, h in reversed(found.items())}.values():
                check_finite(name, features)
        return found

    def _check_known(self) -> None:
        if not all(posterior.known for _, posterior in self._named()):
            raise PredictionError(
                "the predictor has no posterior yet: load a state with load_state_dict, or make "
                "one with Predictor.fit(model, heads, loader) or optimizer.predictor(model)."
            )

    @torch.no_grad()
    def _fit(
        self,
        data: Iterable[Any],
        prior_of: Callable[[Head], Prior],
        prior_variance: PriorVariance = None,
        passes: int = 50,
        max_parameters: int = MAX_PARAMETERS,
    ) -> Predictor:
        heads = self._heads.by_task
        priors = {name: prior_of(head).given(prior_variance) for name, head in heads.items()}
        keep = [name for name, head in heads.items() if head.kind != "regression"]
        source = Source(self.model, self._heads, data, keep)
        found = solve(sums_of(source.pieces(), heads), heads, priors)
        for name in keep:
            rows = partial(source.of, name)
            found[name] = laplace(name, heads[name], rows, priors[name], passes, max_parameters)
        return self._set(found)

    def _set(self, found: Mapping[str, Inferred]) -> Predictor:
        for name, posterior in self._named():
            posterior.set(name, found[name])
        self.posteriors.settle()
        return self


class MeanAndStddev(nn.Module):
    """Mean and standard deviation of every task as plain tensors, without any look at the data.

    Args:
        predictor: whose network and posteriors these are.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.predictor = predictor
        predictor.model.eval()  # an exported graph has one mode
        # The nodes of a cubature cannot be traced: they are made here, by a prediction.
        for _, posterior in predictor._named():
            head, kind = posterior.head, KINDS[posterior.head.kind]
            shape = 1, head.in_features, *[1] * head.channels_first
            features = head.linear.weight.new_zeros(shape)
            kind(kind.reading(features, [posterior]), 0).stddev.detach()

    def forward(self, *inputs: Any, **keywords: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """``(mean, stddev)`` by task, in the shape of the head's output."""
        found = self.predictor(*inputs, **keywords)
        return {name: (p.mean, p.stddev) for name, p in found.items()}

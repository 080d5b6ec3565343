"""What every likelihood shares: the state of a block and its posterior.

A *block* is the set of heads of one likelihood that are computed together. A new likelihood is
one subclass of :class:`Block` and one line in :mod:`bayesagg.likelihoods`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bayesagg.errors import CheckpointError, LossError
from bayesagg.heads import Head
from bayesagg.likelihoods.data import Labels, Observation, Statistics
from bayesagg.likelihoods.running import RunningMean
from bayesagg.moments import LogMoments
from bayesagg.posterior import Gaussian, from_natural

__all__ = ["Block", "Rule"]

Rule = Literal["paper", "likelihood"]


class Block(ABC):
    """The heads of one likelihood, their full-data posterior and this epoch's evidence.

    Args:
        names: names of the heads.
        heads: the heads; all with or all without a bias.
        dtype: of the posterior algebra.
        rule: as of :class:`bayesagg.BayesAgg`.
        weighted: whether some head, of this block or another, has ``s > 0``.
    """

    kind: ClassVar[str]
    decay: ClassVar[float] = 0.9  # of the running mean that is the scale of the likelihood
    needs_curvature: ClassVar[bool] = True

    def __init__(
        self,
        names: Sequence[str],
        heads: Sequence[Head],
        dtype: torch.dtype,
        rule: Rule = "paper",
        weighted: bool = True,
    ) -> None:
        self.names, self.heads, self.dtype, self.rule = list(names), list(heads), dtype, rule
        self.weighted, self.scale = weighted, RunningMean(self.decay)
        self.bias, self.d = heads[0].has_bias, heads[0].in_features
        sizes = [head.num_tasks for head in heads]
        self.num_tasks = sum(sizes)
        self.slices: dict[str, slice] = {}
        start = 0
        for name, size in zip(names, sizes, strict=True):
            self.slices[name] = slice(start, start + size)
            start += size
        self._one_prior = len({head.prior_variance for head in heads}) == 1
        self._settings: dict[tuple[str, torch.device], Tensor] = {}
        self.full: Statistics | None = None
        self.running: Statistics | None = None

    @property
    def width(self) -> int:
        """``D``: shared dimensions plus one for a bias."""
        return self.d + int(self.bias)

    @property
    def extra_sums(self) -> tuple[int, int]:
        """Sums per task in ``Statistics.extra``, and how many of them :meth:`refine` changes."""
        return 0, 0

    def per_task(self, setting: str, device: torch.device) -> Tensor:
        """A numeric head setting for every task, ``[K]``; heads are frozen, so it is cached."""
        key = (setting, device)
        if key not in self._settings:
            values = [
                value
                for head in self.heads
                for value in [float(getattr(head, setting))] * head.num_tasks
            ]
            self._settings[key] = torch.tensor(values, dtype=self.dtype, device=device)
        return self._settings[key]

    def weights(self, device: torch.device) -> Tensor:
        """Current head weights without the bias, rows of all heads below each other."""
        stacked = torch.cat([head.weights() for head in self.heads])
        return stacked.to(device=device, dtype=self.dtype)

    def labels(
        self, observed: Mapping[str, Observation], rows: int, device: torch.device
    ) -> Labels:
        """Labels of all heads of the block, in the dtype of the posterior algebra."""
        joint = self._joint_labels(observed)
        if joint is not None:
            return joint.to(self.dtype)
        parts = [
            self.read_labels(name, head, observed[name])
            if name in observed
            else self.absent(name, head, rows, device)
            for name, head in zip(self.names, self.heads, strict=True)
        ]
        return Labels.stack(parts).to(self.dtype)

    def _joint_labels(self, observed: Mapping[str, Observation]) -> Labels | None:
        """Labels of all heads at once, which is faster than one by one; ``None``: not possible."""
        if len(self.heads) == 1 or any(name not in observed for name in self.names):
            return None
        joint = Observation.join([observed[name] for name in self.names])
        if joint is None:
            return None
        try:
            return self.read_labels(self.names[0], self.heads[0], joint)
        except LossError:  # one by one, to name the task
            return None

    @abstractmethod
    def read_labels(self, name: str, head: Head, observed: Observation) -> Labels:
        """Labels of one head, recovered from its loss and verified, or taken from its target."""

    def label_count(self, labels: Labels) -> Tensor:
        """Number of labels of every task, ``[K]``."""
        if labels.present is None:
            return labels.factor.new_full((self.num_tasks,), float(len(labels.outputs)))
        return labels.present.sum(0).to(labels.factor.dtype)

    @abstractmethod
    def absent(self, name: str, head: Head, rows: int, device: torch.device) -> Labels:
        """Labels of a head that takes no part in this batch."""

    @abstractmethod
    def statistics(self, features: Tensor, labels: Labels) -> Statistics:
        """Evidence of a batch; ``features`` is ``h̃``, ``[N, D]``."""

    @abstractmethod
    def moments(
        self,
        features: Tensor,
        labels: Labels,
        posterior: Gaussian,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> LogMoments:
        """``E[g]`` and the logarithm of ``Var[g]`` for factor one, in ``dtype``."""

    @abstractmethod
    def covariances(
        self, features: Tensor, labels: Labels, posterior: Gaussian, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """``E[g]``, ``[N, K, d]``, and ``Cov[g]``, ``[N, K, d, d]``, for factor one."""

    @staticmethod
    @abstractmethod
    def residual(outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of a loss of factor one at the outputs.

        Args:
            outputs: of one head, ``[o, N]``: outputs (classes) first, data last.
            targets: of the same shape.

        Returns:
            of the same shape.
        """

    @abstractmethod
    def likelihood_gradient(
        self, features: Tensor, labels: Labels, posterior: Gaussian | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient of the negative log-likelihood at h that ``rule="likelihood"`` takes.

        Returns:
            for a loss of factor one, ``[N, K, d]``; and its ratio to that of the loss, ``[N, K]``
            or ``[1, K]``, ``None`` where that is one.
        """

    def gradients(
        self,
        features: Tensor,
        labels: Labels,
        posterior: Gaussian | None,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> tuple[Tensor, LogMoments | None, Tensor | None]:
        """As :meth:`moments` under ``rule="likelihood"``; no variance unless ``weighted``.

        The first result is the gradient, and the third the ratio of :meth:`likelihood_gradient`.
        """
        mean, ratio = self.likelihood_gradient(features, labels, posterior)
        if not self.weighted:
            return mean.to(dtype), None, ratio
        assert posterior is not None
        moments = self.moments(features, labels, posterior, generator, dtype)
        if ratio is not None:
            log_scale = moments.log_scale + 2 * ratio.log().to(dtype)[..., None]
            moments = moments._replace(log_scale=log_scale)
        return mean.to(dtype), moments, ratio

    @abstractmethod
    def module_weights(self, posterior: Gaussian) -> dict[str, Tensor]:
        """Posterior mean of every head as ``[o, D]``, bias last."""

    def natural(
        self, precision: Tensor, shift: Tensor, batch: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        """Natural parameters of the likelihood, before the prior, from summed evidence."""
        return precision, shift

    def refine(  # noqa: B027  (most likelihoods have nothing to add)
        self, features: Tensor, labels: Labels, posterior: Gaussian, batch: Statistics
    ) -> None:
        """Update ``batch.extra`` now that the posterior of the step is known."""

    def step_posterior(self, batch: Statistics) -> Gaussian | None:
        """:meth:`posterior` for a step, ``None`` where its gradient does not depend on it."""
        return self.posterior(batch)

    def posterior(self, batch: Statistics | None) -> Gaussian:
        """Isotropic prior, the last epoch's evidence and the batch's, as one Gaussian (Eq. 9)."""
        evidence = [part for part in (self.full, batch) if part is not None]
        if len(evidence) == 2:
            precision = evidence[0].precision + evidence[1].precision
            shift = evidence[0].shift + evidence[1].shift
        else:  # the sums are added to below, so they must not be those of the evidence
            precision, shift = evidence[0].precision.clone(), evidence[0].shift
        precision, shift = self.natural(precision, shift, batch)
        prior: Tensor | float = 1 / self.heads[0].prior_variance
        if not self._one_prior:
            prior = 1 / self.per_task("prior_variance", precision.device)[:, None]
            precision = precision.expand(self.num_tasks, -1, -1).contiguous()
        precision.diagonal(dim1=-2, dim2=-1).add_(prior)
        return from_natural(precision, shift)

    def commit(self, batch: Statistics) -> None:
        """Fold a batch into this epoch's evidence; takes ownership of ``batch``."""
        self.running = batch if self.running is None else self.running.add_(batch)

    def end_epoch(self) -> None:
        """This epoch's evidence, if there was any, becomes the prior of the next.

        A task without a single label this epoch keeps the evidence it had.
        """
        if self.running is None:
            return
        fresh, old = self.running, self.full
        self.running = None
        seen = fresh.count > 0
        if old is not None and not bool(seen.all()):
            rows = seen[:, None]
            keep = (
                rows[..., None] if max(len(fresh.precision), len(old.precision)) > 1 else seen.any()
            )
            fresh = Statistics(
                torch.where(keep, fresh.precision, old.precision),
                torch.where(rows, fresh.shift, old.shift),
                torch.where(seen, fresh.count, old.count),
                {k: torch.where(seen, v, old.extra[k]) for k, v in fresh.extra.items()},
            )
        self.full = fresh

    def state(self) -> dict[str, Any]:
        """Plain tensors and dicts."""
        parts = (("full", self.full), ("running", self.running))
        state: dict[str, Any] = {
            key: None if part is None else {n: t.clone() for n, t in part.tensors().items()}
            for key, part in parts
        }
        return state | {"noise": self.scale.state()}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of :meth:`state`.

        Raises:
            CheckpointError: if a shape does not fit these heads.
        """
        loaded: dict[str, Statistics | None] = {}
        for key in ("full", "running"):
            part = state[key]
            if part is None:
                loaded[key] = None
                continue
            part = {n: t.to(device, self.dtype) for n, t in part.items()}
            self._check_shapes(part)
            loaded[key] = Statistics.from_tensors(part)
        self.scale.load(state["noise"], self.names, self.num_tasks, (device, self.dtype))
        self.full, self.running = loaded["full"], loaded["running"]

    def _check_shapes(self, part: dict[str, Tensor]) -> None:
        m = self.parameters_per_task
        groups = part["precision"].shape[0]
        shapes = {"precision": (groups, m, m), "shift": (self.num_tasks, m)}
        for name, shape in shapes.items():
            if groups not in (1, self.num_tasks) or tuple(part[name].shape) != shape:
                raise CheckpointError(
                    f"tasks {', '.join(map(repr, self.names))}: the checkpoint's {name} has shape "
                    f"{tuple(part[name].shape)}, these heads need {shape}. It was saved from "
                    f"other heads or another width of the shared representation."
                )

    @property
    def parameters_per_task(self) -> int:
        """``M``, the dimension of each task's posterior."""
        return self.width

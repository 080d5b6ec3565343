"""Descriptions of tasks: which module, which likelihood, which settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from bayesagg.errors import HeadError
from bayesagg.layers import checked_linear, computed, last_layer, sharded_like, unwrapped, whole

__all__ = [
    "BinaryHead",
    "Head",
    "LossTask",
    "MulticlassHead",
    "RegressionHead",
    "check_kinds",
    "named_heads",
    "stacked",
]

Moments = Literal["quadrature", "monte_carlo"]
Readout = Literal["posterior", "gradient"]


@dataclass(frozen=True)
class LossTask:
    """A loss without a head to infer, weighed by its learned scale: its gradient over its mean.

    A contrastive or detection loss, one that pools outputs: its gradient reaches all it depends on,
    over a running mean of the loss (as it is where that is not positive, or by the paper's rule).
    """

    num_tasks: ClassVar[int] = 1


@dataclass(frozen=True, eq=False)
class Head:
    """A linear task head and the settings of its posterior; what is left out is the rule's own.

    Args:
        module: ``nn.Linear`` (or another library's) on ``[..., d]``, a 1×1 convolution on
            ``[B, d, ...]``, or an ``nn.Sequential`` (a tower) that ends in one of them: the input
            of that last linear layer is the head's features.
        s: exponent of the gradient precision in Eq. 7, ≥ 0; 0 weights all tasks alike. Heads of
            different kinds on one network should have the same, or the kind with the smaller
            exponent is drowned out: the weights compare variances raised to different powers.
        prior_variance: γ of the prior ``N(0, γ I)`` over weights and bias, in the rule's units.
        readout: who sets the head's weights: ``"posterior"`` writes the posterior mean into the
            module and the optimizer leaves it alone, ``"gradient"`` trains it by its own
            gradients. Left out, regressions have the first under both rules, classifications under
            the default rule.

    Raises:
        HeadError: if the module is not linear or a setting is out of range.
    """

    module: nn.Module
    _: KW_ONLY
    s: float | None = None
    prior_variance: float | None = None
    readout: Readout | None = None

    kind: ClassVar[str]
    _sharded: list[nn.Parameter] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        module = checked_linear(self.module, name)
        self._check("s", lambda s: _is_finite(s) and s >= 0, "a finite number >= 0")
        self._check("prior_variance", _is_positive, "a finite number > 0")
        self._check_choice("readout", get_args(Readout))
        if self.readout == "posterior" and computed(module):
            raise HeadError(
                f"{name}: readout='posterior' has to write the weights, which a parametrization "
                f"computes. Use readout='gradient' or remove the parametrization."
            )
        self._sharded.extend(p for p in module.parameters() if hasattr(p, "full_tensor"))

    def _check(self, setting: str, holds: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, setting)
        if value is not None and not holds(value):
            raise HeadError(f"{type(self).__name__}: {setting} must be {what}, got {value!r}.")

    def _check_choice(self, setting: str, choices: tuple[str, ...]) -> None:
        self._check(setting, choices.__contains__, f"one of {', '.join(map(repr, choices))}")

    @cached_property
    def linear(self) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """The last linear layer itself, also where it or the tower is compiled."""
        return cast("nn.Linear", unwrapped(last_layer(self.module)))

    @cached_property
    def watched(self) -> nn.Module:
        """The module whose calls are those of the last linear layer: it, or its compiled form."""
        return last_layer(self.module)

    @property
    def writable(self) -> bool:
        """Whether a posterior mean may be written: parameters that train, none of them computed."""
        linear = self.linear
        own = linear._parameters.values()
        return not computed(linear) and all([p is None or p.requires_grad for p in own])

    @cached_property
    def channels_first(self) -> bool:
        """Whether the features are dimension 1 (convolutions) or the last (linear layers)."""
        return self.linear.weight.dim() > 2

    @cached_property
    def in_features(self) -> int:
        """Shared dimensions d."""
        return int(self.linear.weight.shape[1])

    @cached_property
    def out_features(self) -> int:
        """Number of outputs of the module."""
        return int(self.linear.weight.shape[0])

    @property
    def num_tasks(self) -> int:
        """Tasks in the sense of the paper: one per output."""
        return self.out_features

    @cached_property
    def has_bias(self) -> bool:
        """Whether the weights include a bias."""
        return self.linear.bias is not None

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias parameters of the module; those that an optimizer holds under FSDP2."""
        if self._sharded or self.linear._modules:  # with parametrizations
            return self._sharded or list(self.linear.parameters())
        return [p for p in self.linear._parameters.values() if p is not None]

    def write(self, weights: Tensor) -> None:
        """Overwrite weight and bias with the rows of ``weights``, ``[o, D]``, bias last."""
        # FSDP2 swaps gathered weights for the sharded ones: either may be in place now.
        for parameter in (*self.linear._parameters.values(), *self._sharded):
            if parameter is None:
                continue
            bias = parameter.dim() == 1
            part = weights.select(1, -1) if bias else weights.narrow(1, 0, self.in_features)
            if parameter.dim() > 2 or type(parameter) is not nn.Parameter:
                part = sharded_like(part.view(parameter.shape), parameter)
            parameter.copy_(part)

    def weights(self) -> Tensor:
        """Weights without the bias, ``[o, d]``, detached, in the module's dtype.

        Weights that are sharded over ranks are gathered: all ranks must call.
        """
        weight = whole(self.linear.weight)
        return weight if weight.dim() == 2 else weight.flatten(1)


def _is_finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


def stacked(head: Head) -> Tensor:
    """Weights of a head with the bias last, ``[o, D]``; as :meth:`Head.weights` otherwise."""
    if not head.has_bias:
        return head.weights()
    bias = head.linear.bias
    assert bias is not None
    return torch.cat([head.weights(), whole(bias)[:, None]], 1)


@dataclass(frozen=True, eq=False)
class RegressionHead(Head):
    """A head with squared error; ``o`` outputs are ``o`` tasks with independent noise.

    Settings of :class:`Head`, and:

    Args:
        noise_variance: τ² of the Gaussian likelihood, in squared units of the labels, or
            ``"learned"``: a running mean of squared residuals, per output.
    """

    noise_variance: float | Literal["learned"] | None = field(default=None, kw_only=True)

    kind: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_variance != "learned":
            self._check("noise_variance", _is_positive, "a finite number > 0")


@dataclass(frozen=True, eq=False)
class _ClassificationHead(Head):
    moments: Moments | None = field(default=None, kw_only=True)
    num_samples: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("moments", get_args(Moments))
        self._check(
            "num_samples", lambda n: isinstance(n, int) and n >= 2, "an integer of at least 2"
        )


@dataclass(frozen=True, eq=False)
class BinaryHead(_ClassificationHead):
    """A head with binary cross-entropy on logits; ``o`` outputs are ``o`` tasks.

    Settings of :class:`Head`, and:

    Args:
        moments: ``"quadrature"``, or ``"monte_carlo"`` (Eq. 11).
        num_samples: J of Eq. 11, at least 2.
    """

    kind: ClassVar[str] = "binary"


@dataclass(frozen=True, eq=False)
class MulticlassHead(_ClassificationHead):
    """A head with cross-entropy over ``C ≥ 2`` classes; one task, of a module with ``C`` outputs.

    Settings of :class:`Head`, and:

    Args:
        moments: ``"quadrature"`` (cubature over the logits), or ``"monte_carlo"`` (Eq. 11).
        num_samples: J of Eq. 11, at least 2.

    Raises:
        HeadError: as of :class:`Head`, and for a module with one output.
    """

    kind: ClassVar[str] = "multiclass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out_features < 2:
            raise HeadError("MulticlassHead needs at least two outputs; use BinaryHead for one.")

    @property
    def num_tasks(self) -> int:
        """One task, whatever the number of classes."""
        return 1


def check_kinds(heads: Mapping[str, Head], known: Collection[str], what: str) -> None:
    """Whether every kind of head has an entry; kinds may be added, see docs/contributing.md.

    Raises:
        HeadError: if one has none.
    """
    for name, head in heads.items():
        if head.kind not in known:
            raise HeadError(
                f"task {name!r}: {what} has no entry for heads of kind {head.kind!r}. Add one (see "
                f"contributing, a new likelihood), or make the task a LossTask()."
            )


def named_heads(
    heads: Mapping[str, Head | LossTask] | Sequence[Head | LossTask],
) -> dict[str, Head | LossTask]:
    """Tasks by name (``"0"``, ``"1"``, … for a sequence), checked against each other.

    Raises:
        HeadError: for no task at all, what is neither head nor loss, or one module given twice.
    """
    named = dict(heads) if isinstance(heads, Mapping) else {str(i): h for i, h in enumerate(heads)}
    owners: dict[int, str] = {}
    for name, head in named.items():
        if isinstance(head, LossTask):
            continue
        if not isinstance(head, Head):
            raise HeadError(
                f"heads[{name!r}] is a {type(head).__name__}: wrap the module in RegressionHead, "
                f"BinaryHead or MulticlassHead, or pass LossTask() for a loss without a head."
            )
        for thing in (head.linear, *head.parameters()):
            other = owners.setdefault(id(thing), name)
            if other != name:
                raise HeadError(
                    f"heads {other!r} and {name!r} share one module, or weights: give each task "
                    f"its own linear layer, or pass it once (every output of it is a task)."
                )
    if not named:
        raise HeadError(
            "`heads` is empty: pass a RegressionHead, BinaryHead or MulticlassHead for each task, "
            "or LossTask() for a loss without a head."
        )
    return named

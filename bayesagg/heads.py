"""Descriptions of task heads: which module, which likelihood, which settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal, cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from bayesagg.errors import HeadError

__all__ = ["BinaryHead", "Head", "MulticlassHead", "RegressionHead"]

Moments = Literal["quadrature", "monte_carlo"]
Readout = Literal["posterior", "gradient"]

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Head:
    """A linear task head and the settings of its posterior.

    Args:
        module: ``nn.Linear`` on ``[..., d]``, or a 1×1 convolution on ``[B, d, ...]``.
        s: exponent of the gradient precision in Eq. 7, ≥ 0; 0 weights all tasks alike. Heads of
            different kinds on one network should have the same, or the kind with the smaller
            exponent is drowned out: the weights compare variances raised to different powers.
        prior_variance: γ of the isotropic prior ``N(0, γ I)`` over the weights and the bias.
        readout: who sets the head's weights: ``"posterior"`` writes the full-data posterior mean
            into the module at each epoch's end and the optimizer leaves it alone, ``"gradient"``
            trains it by ordinary gradients.

    Raises:
        HeadError: if the module is not linear or a setting is out of range.
    """

    module: nn.Module
    _: KW_ONLY
    s: float = 0.0
    prior_variance: float = 1.0
    readout: Readout = "gradient"

    kind: ClassVar[str]
    _sharded: list[nn.Parameter] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        name = type(self).__name__
        module = getattr(self.module, "_orig_mod", self.module)  # torch.compile's wrapper
        if not isinstance(module, _LINEAR):
            raise HeadError(
                f"{name} needs a linear module (nn.Linear, or a 1x1 nn.Conv), got "
                f"{type(module).__name__}. Pass the head's last linear layer and move the layers "
                f"before it into the shared network."
            )
        if not isinstance(module, nn.Linear) and (
            set(module.kernel_size) != {1}
            or set(module.stride) != {1}
            or module.groups != 1
            or (set(module.padding) != {0} and module.padding != "valid")
        ):
            raise HeadError(
                f"{name} needs a convolution of kernel size 1, stride 1, one group and no "
                f"padding, got {module}. Anything wider is not a linear head per position."
            )
        if isinstance(module.weight, UninitializedParameter):
            raise HeadError(
                f"{name}: the lazy module is not initialised yet. Run one forward pass of the "
                f"model before wrapping the optimizer."
            )
        self._check_number("s", self.s, minimum=0.0, inclusive=True)
        self._check_number("prior_variance", self.prior_variance)
        self._check_choice("readout", self.readout, ("posterior", "gradient"))
        if self.readout == "posterior" and is_parametrized(module):
            raise HeadError(
                f"{name}: readout='posterior' has to write the weights, which a parametrization "
                f"computes. Use readout='gradient' or remove the parametrization."
            )
        self._sharded.extend(p for p in module.parameters() if hasattr(p, "full_tensor"))

    def _check_number(
        self, name: str, value: object, minimum: float = 0.0, inclusive: bool = False
    ) -> None:
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or value < minimum:  # type: ignore[arg-type,operator]
            valid = False
        if not valid or (value == minimum and not inclusive):
            bound = ">=" if inclusive else ">"
            raise HeadError(
                f"{type(self).__name__}: {name} must be a finite number {bound} {minimum:g}, "
                f"got {value!r}."
            )

    def _check_choice(self, name: str, value: object, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise HeadError(
                f"{type(self).__name__}: {name} must be one of {', '.join(map(repr, choices))}, "
                f"got {value!r}."
            )

    @property
    def linear(self) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """The linear module itself, also where ``module`` is compiled."""
        return cast("nn.Linear", getattr(self.module, "_orig_mod", self.module))

    @property
    def channels_first(self) -> bool:
        """Whether the features are dimension 1 (convolutions) or the last (linear layers)."""
        return not isinstance(self.linear, nn.Linear)

    @property
    def in_features(self) -> int:
        """Shared dimensions d."""
        return int(self.linear.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Number of outputs of the module."""
        return int(self.linear.weight.shape[0])

    @property
    def num_tasks(self) -> int:
        """Tasks in the sense of the paper: one per output."""
        return self.out_features

    @property
    def has_bias(self) -> bool:
        """Whether the weights include a bias."""
        return self.linear.bias is not None

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias parameters of the module; those that an optimizer holds under FSDP2."""
        return self._sharded or list(self.linear.parameters())

    def write(self, weights: Tensor) -> None:
        """Overwrite weight and bias with the rows of ``weights``, ``[o, D]``, bias last."""
        # FSDP2 swaps gathered weights for the sharded ones: either may be in place now.
        for parameter in dict.fromkeys([*self.linear.parameters(), *self._sharded]):
            part = weights[:, : self.in_features] if parameter.dim() > 1 else weights[:, -1]
            parameter.copy_(_like(part.view(parameter.shape), parameter))

    def weights(self) -> Tensor:
        """Weights without the bias, ``[o, d]``, detached, in the module's dtype.

        Weights that are sharded over ranks are gathered: all ranks must call.
        """
        return _whole(self.linear.weight).flatten(1)


def _whole(parameter: Tensor) -> Tensor:
    """A tensor that may be sharded (a ``DTensor``), gathered."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter.detach() if gather is None else cast("Tensor", gather()).detach()


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A value that every rank has, sharded as the parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


@dataclass(frozen=True, eq=False)
class RegressionHead(Head):
    """A head with squared error; ``o`` outputs are ``o`` tasks with independent noise.

    Args:
        module: as in :class:`Head`.
        s: as in :class:`Head`.
        prior_variance: as in :class:`Head`.
        readout: as in :class:`Head`; the paper's choice for regression is ``"posterior"``.
        noise_variance: τ² of the Gaussian likelihood, in squared units of the labels, or
            ``"learned"``: a running mean of the expected squared residual, per output.
    """

    readout: Readout = field(default="posterior", kw_only=True)
    noise_variance: float | Literal["learned"] = field(default="learned", kw_only=True)

    kind: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.noise_variance, str):
            self._check_choice("noise_variance", self.noise_variance, ("learned",))
        else:
            self._check_number("noise_variance", self.noise_variance)


@dataclass(frozen=True, eq=False)
class _ClassificationHead(Head):
    moments: Moments = field(default="quadrature", kw_only=True)
    num_samples: int = field(default=1024, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("moments", self.moments, ("quadrature", "monte_carlo"))
        if not isinstance(self.num_samples, int) or self.num_samples < 2:
            raise HeadError(
                f"{type(self).__name__}: num_samples must be an integer of at least 2, got "
                f"{self.num_samples!r}."
            )


@dataclass(frozen=True, eq=False)
class BinaryHead(_ClassificationHead):
    """A head with binary cross-entropy on logits; ``o`` outputs are ``o`` tasks.

    Args:
        module: as in :class:`Head`.
        s: as in :class:`Head`.
        prior_variance: as in :class:`Head`.
        readout: as in :class:`Head`; the paper's choice for classification is ``"gradient"``.
        moments: ``"quadrature"``, or ``"monte_carlo"`` (Eq. 11).
        num_samples: J of Eq. 11, at least 2.
    """

    kind: ClassVar[str] = "binary"


@dataclass(frozen=True, eq=False)
class MulticlassHead(_ClassificationHead):
    """A head with cross-entropy over ``C ≥ 2`` classes; one task.

    Args:
        module: as in :class:`Head`, with ``C`` outputs.
        s: as in :class:`Head`.
        prior_variance: as in :class:`Head`.
        readout: as in :class:`Head`; the paper's choice for classification is ``"gradient"``.
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


def named_heads(heads: Mapping[str, Head] | Sequence[Head]) -> dict[str, Head]:
    """Heads by name (``"0"``, ``"1"``, … for a sequence), checked against each other.

    Raises:
        HeadError: if there are none, an entry is not a head, one module is given twice, or the
            heads do not read the same kind of tensor.
    """
    items = (
        heads.items() if isinstance(heads, Mapping) else ((str(i), h) for i, h in enumerate(heads))
    )
    named = dict(items)
    if not named:
        raise HeadError(
            "`heads` is empty: pass one RegressionHead, BinaryHead or MulticlassHead a task."
        )
    owners: dict[int, str] = {}
    for name, head in named.items():
        if not isinstance(head, Head):
            raise HeadError(
                f"heads[{name!r}] is a {type(head).__name__}: wrap the module in RegressionHead, "
                f"BinaryHead or MulticlassHead."
            )
        other = owners.setdefault(id(head.linear), name)
        if other != name:
            raise HeadError(
                f"heads {other!r} and {name!r} share one module: give each task its own linear "
                f"layer, or pass it once (every output of it is a task)."
            )
    first_name, first = next(iter(named.items()))
    for name, head in named.items():
        if head.in_features != first.in_features or head.channels_first != first.channels_first:
            raise HeadError(
                f"heads {first_name!r} ({first.linear}) and {name!r} ({head.linear}) do not read "
                f"the same representation: all heads must take the same shared tensor."
            )
    return named

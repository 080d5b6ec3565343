"""What reading asks of a likelihood."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from bayesagg.reading.observed import Found, Observed, Read, Said
from bayesagg.reading.targets import Targets, beside_outputs, raise_infinite

__all__ = ["Likelihood", "PerOutput"]


class Likelihood(Protocol):
    """A negative log-likelihood of one datum as a function of a head's output; stateless.

    Tensors are in the layout of :class:`bayesagg.reading.observed.Observed`; results per datum
    and task are ``[N, K]``.

    Attributes:
        kind: of the heads.
        needs_factor: whether :meth:`read` must be told the factor.
        loss_name: for messages.
        hints: likely causes of a loss that is not it, for messages.
        other_labels: what to do about targets that are not the labels of the loss, for messages.
    """

    kind: ClassVar[str]
    needs_factor: ClassVar[bool]
    loss_name: ClassVar[str]
    hints: ClassVar[str]
    other_labels: ClassVar[str]

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of factor one."""

    def residual(self, output: Tensor, target: Tensor) -> Tensor:
        """Its derivative at the output."""

    def curved(self, output: Tensor, v: Tensor) -> Tensor:
        """Its second derivative times ``v``."""

    def size(self, a: Tensor) -> Tensor:
        """Size of something like the residual, over the outputs of a task."""

    def against(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the number ``f`` for which ``a`` is closest to ``f b``."""

    def noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Absolute rounding of the residual."""

    def curvature_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Absolute rounding of ``curved`` at a ``v`` of about one."""

    def value_noise(self, output: Tensor, eps: float) -> Tensor | float:
        """Absolute rounding of the value."""

    def targets(self, saids: list[Said], like: Tensor, partial: bool) -> Targets:
        """What the user passed.

        Args:
            saids: heads with a target.
            like: outputs of all of them.
            partial: some may be missing; else a missing one is not valid.

        Raises:
            TargetError: for a wrong shape.
        """

    def raise_invalid(self, said: Said) -> None:
        """Say what is wrong with the target of a head; looks at the device.

        Raises:
            TargetError: if something is.
        """

    def read(
        self, observed: Observed, factor: Tensor | None, present: Tensor | None = None
    ) -> Read:
        """Labels from the gradient alone, for a loss whose form and factor are known.

        Args:
            observed: without targets.
            factor: ``[1, K]``.
            present: where the gradient is not zero, ``[N, K]``: elsewhere labels are missing.
                ``None``: none is.
        """

    def recover(self, observed: Observed) -> Found:
        """Labels and factor from first and second derivatives, all of them checked."""

    def recover_any(self, observed: Observed) -> Found:
        """As :meth:`recover`, also of labels that cannot be relied on without targets."""


class PerOutput(Likelihood):
    """What likelihoods have in common of which every output is a task with a number for a label."""

    def size(self, a: Tensor) -> Tensor:
        """Absolute value."""
        return a.abs()

    def against(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """``a`` along ``b``, and the length of ``b``."""
        return a * b.sign(), b.abs()

    def valid(self, target: Tensor) -> Tensor:
        """Whether all labels can be; NaN and infinity cannot."""
        raise NotImplementedError

    def targets(self, saids: list[Said], like: Tensor, partial: bool) -> Targets:
        """One number per output; NaN is missing."""
        y, present = beside_outputs(saids, like), None
        if partial:
            missing = y.isnan()
            y, present = y.masked_fill(missing, 0), ~missing
        return Targets(y, present, self.valid(y))

    def raise_invalid(self, said: Said) -> None:
        """An infinite target.

        Raises:
            TargetError: for one.
        """
        raise_infinite(said)

    def recover_any(self, observed: Observed) -> Found:
        """As :meth:`recover`."""
        return self.recover(observed)

"""What is no setting of the library's default rule: ablations that replace one of its functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch

from bayesagg import LikelihoodRule
from bayesagg.rules import Plan, gradients, streaming


class _Replaced(LikelihoodRule):
    """The default rule with a function of one of its modules changed."""

    module: ClassVar[ModuleType]
    function: ClassVar[str]
    change: ClassVar[Callable[..., Any]]  # called with what the function gives, and its arguments

    def plan(self, *arguments: Any) -> Plan:
        """As of the base."""
        own = getattr(self.module, self.function)

        def changed(*given: Any) -> Any:
            return self.change(own(*given), *given)

        with mock.patch.object(self.module, self.function, changed):
            return super().plan(*arguments)


class InSampleRule(_Replaced):
    """Predictions of the posterior that has seen the datum."""

    module: ClassVar = gradients
    function: ClassVar = "leave_one_out"

    @staticmethod
    def change(found: Any, *given: Any) -> Any:
        """With the residual of the whole posterior in place of that without the datum."""
        return replace(
            found, residual=found.residual * found.rest, rest=torch.ones_like(found.rest)
        )


class PriorInNoiseRule(_Replaced):
    """With prior ``N(0, τ²)`` for every regression, in units of its noise."""

    module: ClassVar = streaming
    function: ClassVar = "scales_and_ridges"

    @staticmethod
    def change(found: Any, frame: Any, exact: int, *given: Any) -> Any:
        """A ridge of 1 for every regression, however noisy."""
        scale, ridge = found
        fixed = torch.ones_like(ridge[:, :exact])
        return scale, torch.cat([fixed, ridge[:, exact:]], 1)

"""What is no setting of the library's default rule: ablations that replace one of its functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from bayesagg import LikelihoodRule
from bayesagg.moments.student import LeaveOneOut, leave_one_out
from bayesagg.rules import Plan, streaming


class _Replaced(LikelihoodRule):
    """The default rule with functions of :mod:`bayesagg.rules.streaming` replaced, by name."""

    functions: ClassVar[Mapping[str, Any]]

    def plan(self, *arguments: Any) -> Plan:
        """As of the base."""
        with mock.patch.multiple(streaming, **self.functions):
            return super().plan(*arguments)


def _in_sample(*arguments: Any) -> LeaveOneOut:
    """Predictions of the posterior that has seen the datum."""
    found = leave_one_out(*arguments)
    return replace(found, residual=found.own, kappa=torch.ones_like(found.kappa))


class InSampleRule(_Replaced):
    """Without leaving a datum out of the posterior that predicts it."""

    functions: ClassVar = {"leave_one_out": _in_sample}


_ridge = streaming._ridge


def _prior_in_noise(rule: LikelihoodRule, *arguments: Any) -> tuple[Tensor, Tensor]:
    """A ridge of 1 for every regression, however noisy."""
    scale, ridge = _ridge(rule, *arguments)
    exact = arguments[1].exact
    return scale, torch.cat([torch.ones_like(ridge[:, :exact]), ridge[:, exact:]], 1)


class PriorInNoiseRule(_Replaced):
    """With prior ``N(0, τ²)`` for every regression, in units of its noise."""

    functions: ClassVar = {"_ridge": _prior_in_noise}

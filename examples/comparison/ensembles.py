"""Deep ensembles (Lakshminarayanan et al., 2017), as the paper's Table 5 compares them.

Linear scalarization, averaged over the members of an ensemble: many heads of each task on one
backbone, or many networks. Only the mean over the members enters the gradient of the shared
layers, not their spread. A prediction is the mean over the members: of the values of a regression,
of the probabilities of a classification.

In training a batch goes through all members at once: outputs have a row per member and datum,
member by member, and :func:`per_member` repeats the targets, so that a loss, which is a mean over
rows, is the mean of the members' losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.comparison.networks import Networks
from examples.comparison.tasks import HeadGroup, Kind, Outputs
from examples.methods import LinearScalarization
from examples.training import Criterion, Losses


def per_member(criterion: Criterion) -> Criterion:
    """The criterion for outputs by head, each ``(M B, …)``, and the targets of a batch, ``(B, K)``.

    Every loss of ``criterion`` has to be a mean over rows.
    """

    def losses(outputs: Outputs, y: Tensor) -> Losses:
        members = len(next(iter(outputs.values()))) // len(y)
        return criterion(outputs, y.repeat(members, 1))

    return losses


def mean_prediction(outputs: Tensor, kind: Kind) -> Tensor:
    """The output whose prediction is the mean prediction of the members.

    Args:
        outputs: Of each member, shape ``(M, B, o)``: values, or logits.
        kind: Of the head.

    Returns:
        Values, or logits of the mean probabilities, shape ``(B, o)``.
    """
    if kind == "regression":
        return outputs.mean(0)
    if kind == "binary":
        return F.logsigmoid(outputs).logsumexp(0) - F.logsigmoid(-outputs).logsumexp(0)
    return outputs.log_softmax(-1).logsumexp(0) - math.log(len(outputs))


class EnsembleHead(nn.Linear):
    """Many linear heads side by side, each with its own random weights; the first is ``head``.

    Maps the representation ``(B, width)`` to ``(M B, o)``, member by member, in training, and to
    the mean prediction ``(B, o)`` in evaluation.

    Args:
        head: The head of one network; its weights are copied.
        members: Number of heads, M.
        kind: Of the head.
    """

    def __init__(self, head: nn.Linear, members: int, kind: Kind) -> None:
        # The initial weights of a linear layer depend on its inputs only.
        super().__init__(head.in_features, members * head.out_features, head.bias is not None)
        self.members, self._kind = members, kind
        with torch.no_grad():
            for own, first in zip(self.parameters(), head.parameters(), strict=True):
                own[: head.out_features] = first

    def forward(self, h: Tensor) -> Tensor:
        outputs = super().forward(h).unflatten(-1, (self.members, -1)).transpose(0, 1)
        return outputs.flatten(0, 1) if self.training else mean_prediction(outputs, self._kind)


class EnsembleNetworks(Networks):
    """Independent networks of one shape: outputs by head as those of :class:`EnsembleHead`."""

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The heads of the first network."""
        return self.networks[0].groups

    def forward(self, x: Any) -> Outputs:
        """Outputs by head, each ``(M B, o)`` in training and ``(B, o)`` in evaluation."""
        members = [network(x) for network in self.networks]
        outputs = {name: torch.stack([m[name] for m in members]) for name in members[0]}
        if self.training:
            return {name: values.flatten(0, 1) for name, values in outputs.items()}
        return {g.name: mean_prediction(outputs[g.name], g.kind) for g in self.groups}


class Ensemble(LinearScalarization):
    """The base: an ensemble's static ``network`` multiplies that which a function makes.

    All its steps are linear scalarization, so there is no warm-up to tell apart.
    """

    def __init__(self, *shared: Any, members: int) -> None:
        super().__init__(*shared)
        self.members, self.warmup_steps = members, 0


class HeadEnsemble(Ensemble):
    """Many heads of each task on one backbone.

    The backbone gets the gradient averaged over the members, each head that of its own loss, as if
    it were alone: the share of an average would be lost in Adam's ε and in the weight decay. The
    clipping, which is before that, sees the gradient of the average.
    """

    def __init__(self, *shared: Any, members: int = 1024) -> None:
        super().__init__(*shared, members=members)
        self._heads = [m for m in self.model.modules() if isinstance(m, EnsembleHead)]
        self.optimizer.register_step_pre_hook(lambda *_: self._undo_the_average())

    @staticmethod
    def network(make: Callable[[], nn.Module], members: int = 1024) -> nn.Module:
        """A network with its heads multiplied, in place."""
        model = make()
        kinds = {id(group.module): group.kind for group in model.groups}
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and id(child) in kinds:
                    setattr(module, name, EnsembleHead(child, members, kinds.pop(id(child))))
        if kinds:
            raise ValueError("a head of the network is none of its linear modules")
        return model

    def _undo_the_average(self) -> None:
        for head in self._heads:
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.members)


class NetworkEnsemble(Ensemble):
    """Many networks, each trained as it would be alone."""

    @staticmethod
    def network(make: Callable[[], nn.Module], members: int = 10) -> nn.Module:
        """Networks with different random weights."""
        return EnsembleNetworks([make() for _ in range(members)])

    def objective(self, values: Tensor) -> Tensor:
        """Sum over members and tasks; the losses are means over the members."""
        return self.members * super().objective(values)

"""Full verification: second derivatives of every loss, probed in random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesagg.reading.batch import Labels
from bayesagg.reading.diagnose import diagnose
from bayesagg.reading.given import fit
from bayesagg.reading.known import Known
from bayesagg.reading.observed import Found, Said, tolerance
from bayesagg.reading.step import Group, labels_of

__all__ = ["Verified", "verify"]

_SEED = 20_251_124
_FEW = 32  # numbers of which two directions at random might be nearly parallel by chance


@dataclass(frozen=True)
class Verified:
    """What was found of one head.

    Attributes:
        labels: ``None``: its loss is not the likelihood.
        known: to remember; ``None``: nothing was to be seen.
    """

    labels: Labels | None
    known: Known | None


def verify(
    groups: Sequence[Group],
    saids: Sequence[Said],
    losses: Mapping[str, Tensor],
    total: Tensor,
    known: Mapping[str, Known],
) -> dict[str, Verified]:
    """Labels of all heads of some groups, from first and second derivatives.

    Args:
        groups: to verify.
        saids: all heads of the step.
        losses: all losses of the step, scalars.
        total: their sum.
        known: of earlier steps.

    Raises:
        LossError: for a loss that is not the likelihood, without targets.
        TargetError: for targets that are not those of the loss.
    """
    here = [said for group in groups for said in group.saids]
    if not _probe(total, here):  # one loss cannot be differentiated twice: which?
        for said in here:
            _probe(said.loss, [said])
    results: dict[str, Verified] = {}
    failing: list[Group] = []
    with torch.no_grad():
        for group in groups:
            for part in _by_probes(group):
                failing += _judge(part, known, results)
    if failing:
        for name in diagnose(failing, saids, losses):
            results[name] = Verified(None, Known(own=True))
    return results


def _by_probes(group: Group) -> list[Group]:
    """Heads with second derivatives and those without apart."""
    parts: dict[bool, list[int]] = {}
    for i, said in enumerate(group.saids):
        parts.setdefault(bool(said.probes), []).append(i)
    return [
        Group([group.saids[i] for i in some], [group.known[i] for i in some], False, True)
        for some in parts.values()
    ]


def _judge(group: Group, known: Mapping[str, Known], results: dict[str, Verified]) -> list[Group]:
    """Take down the heads of a group whose labels hold, and return the others one by one."""
    observed = group.observed
    if group.usable is not None:
        found = fit(group.likelihood, observed)
    elif observed.probes:
        found = group.likelihood.recover(observed)
    else:
        found = _nothing(group)
    valid = found.valid.tolist()
    labels = labels_of(observed, found, False)
    start, failing = 0, []
    for i, said in enumerate(group.saids):
        stop = start + said.layout.tasks
        if valid[i]:
            results[said.name] = _take(group, found, i, labels.columns(start, stop), known)
        else:
            failing.append(i)
        start = stop
    return _alone(group, failing)


def _nothing(group: Group) -> Found:
    """No label at all, if the losses are zero times an output, as where a batch has none."""
    observed, size = group.observed, group.likelihood.size
    quiet = size(observed.gradient) == 0
    valid = observed.all_of_head(quiet.all(0)) & (observed.losses == 0)
    return Found(
        torch.zeros_like(observed.output), torch.ones_like(size(observed.output)[:1]), ~quiet, valid
    )


def _alone(group: Group, indices: Sequence[int]) -> list[Group]:
    return [Group([group.saids[i]], [group.known[i]], False, True) for i in indices]


def _take(
    group: Group, found: Found, index: int, labels: Labels, known: Mapping[str, Known]
) -> Verified:
    """One head's labels, and what to remember of its loss."""
    said = group.saids[index]
    before = known.get(said.name)
    present, factor = labels.present, labels.factor
    assert present is not None
    counts = present.sum(0).tolist()
    count = sum(counts)
    weighted = found.weighted is not None and bool(found.weighted[index])
    if not weighted:
        factor = factor[:1]
    labels = Labels(
        labels.outputs, labels.targets, factor, None if count == present.numel() else present
    )
    if before is not None and before.own:
        return Verified(None, before)
    if count == 0:
        return Verified(labels, before)
    seen = not weighted and min(counts) > 0
    new = Known(
        weighted=weighted,
        masked=count < present.numel(),
        factor=tuple(factor[0].tolist()) if seen else (),
        rows=len(present),
        labels=tuple(counts),
        forms=(said.form,),
    )
    return Verified(labels, new.after(before, 4 * tolerance(said.eps)))


def _probe(loss: Tensor, saids: Sequence[Said]) -> bool:
    """Second derivatives of a loss at the outputs of heads times random numbers, several times.

    The numbers are of random sign and size, so that sums of second derivatives (outputs that are
    pooled) cannot pass for a diagonal.

    Returns:
        whether the loss can be differentiated twice; heads of which this is not to be said stay
        without probes.
    """
    outputs = [call.output for said in saids for call in said.calls]
    numbers = sum(output.numel() for output in outputs)
    generator = torch.Generator(outputs[0].device).manual_seed(_SEED + numbers)
    probes = []
    try:
        gradients = torch.autograd.grad(
            loss, outputs, create_graph=True, retain_graph=True, allow_unused=True
        )
        for _ in range(4 if numbers <= _FEW else 2):
            v = [_random_like(output, generator) for output in outputs]
            probes.append((v, _times(gradients, outputs, v)))
    except RuntimeError as error:
        if not _is_of_autograd(error):
            raise
        return False
    for v, curved in probes:
        triples = iter(zip(gradients, v, curved, strict=True))
        for said in saids:
            some = [next(triples) for _ in said.calls]
            # One that depends on nothing has lost its graph, as in a function of the user's.
            if any(g is not None and g.requires_grad for g, _, _ in some):
                said.probes.append(([a for _, a, _ in some], [b for _, _, b in some]))
    return True


def _random_like(output: Tensor, generator: torch.Generator) -> Tensor:
    size = torch.rand(output.shape, generator=generator, device=output.device)
    sign = torch.rand(output.shape, generator=generator, device=output.device)
    return torch.where(sign < 0.5, -0.5 - size, 0.5 + size).to(output.dtype)


def _times(
    gradients: Sequence[Tensor | None], outputs: Sequence[Tensor], v: Sequence[Tensor]
) -> list[Tensor]:
    smooth = [
        (g, w) for g, w in zip(gradients, v, strict=True) if g is not None and g.requires_grad
    ]
    if not smooth:
        return [torch.zeros_like(output) for output in outputs]
    found = torch.autograd.grad(
        [g for g, _ in smooth],
        outputs,
        [w for _, w in smooth],
        retain_graph=True,
        allow_unused=True,
    )
    return [
        torch.zeros_like(output) if curved is None else curved.detach()
        for output, curved in zip(outputs, found, strict=True)
    ]


def _is_of_autograd(error: RuntimeError) -> bool:
    """Whether it says that something cannot be differentiated twice."""
    says = str(error)
    return any(
        part in says
        for part in ("double backward", "differentiate twice", "not implemented", "derivative for")
    )

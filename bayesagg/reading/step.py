"""One step's heads, grouped by what can be computed at once, and the parts made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bayesagg.errors import FeatureError
from bayesagg.reading.batch import Labels, Part
from bayesagg.reading.binary import Binary
from bayesagg.reading.known import Known
from bayesagg.reading.likelihood import Likelihood
from bayesagg.reading.multiclass import Multiclass
from bayesagg.reading.observed import Found, Observed, Read, Said, join
from bayesagg.reading.regression import Regression

__all__ = ["LIKELIHOODS", "Features", "Group", "group_heads", "labels_of", "make_parts"]

_MANY = 8  # tensors that are better copied together than looked at one by one

LIKELIHOODS: dict[str, Likelihood] = {
    likelihood.kind: likelihood for likelihood in (Regression(), Binary(), Multiclass())
}
"""By kind of head; a new one is a file and an entry here."""


@dataclass
class Group:
    """Heads that are read at once: of one kind, with as many data, known in the same way.

    Attributes:
        saids: of every head.
        names: of the heads.
        known: what was verified of any of them earlier.
        own: the losses are known not to be the likelihood, and may be.
        likelihood: of the heads.
        observed: the heads side by side.
        partial: labels may be missing or have weights.
        usable: whether all targets are valid, a tensor; ``None`` without targets.
        read: labels by what is known of the losses; ``None``: they have to be verified.
        complete: by head: every label is present.
    """

    saids: list[Said]
    known: list[Known | None]
    own: bool
    partial: bool
    names: tuple[str, ...] = field(init=False)
    likelihood: Likelihood = field(init=False)
    observed: Observed = field(init=False)
    usable: Tensor | None = None
    read: Read | None = None
    complete: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = tuple([said.name for said in self.saids])
        self.likelihood = LIKELIHOODS[self.saids[0].layout.kind]
        self.observed = join(self.saids)
        if self.saids[0].target is not None and not self.own:
            self.join_targets()

    def join_targets(self) -> None:
        """Lay the targets beside the outputs.

        Raises:
            TargetError: for a wrong shape.
        """
        like = self.observed.output
        target, present, self.usable = self.likelihood.targets(self.saids, like, self.partial)
        self.observed = replace(self.observed, target=target, present=present)


def group_heads(saids: Sequence[Said], known: Mapping[str, Known]) -> list[Group]:
    """Groups in the order of their first heads."""
    groups: dict[tuple[object, ...], tuple[list[Said], list[Known | None]]] = {}
    for said in saids:
        layout, output, form = said.layout, said.outputs[0], known.get(said.name)
        plain = len(said.calls) == 1 and output.dim() == 2
        some = form or _NEW
        what = (
            *(layout.kind, layout.classes, output.dtype, output.shape[0] if plain else said.key),
            *(said.target is not None, some.own, some.weighted, some.masked, some.by_label),
        )
        here, forms = groups.setdefault(what, ([], []))
        here.append(said)
        forms.append(form)
    made = []
    for here, forms in groups.values():
        first = forms[0] or _NEW
        own = first.own and here[0].target is not None
        made.append(Group(here, forms, own, first.weighted or first.masked or not all(forms)))
    return made


_NEW = Known()


class Features:
    """Features of every set of tensors that heads read, flattened once."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, ...], tuple[str, Tensor]] = {}

    def of(self, said: Said) -> Tensor:
        """``[N, d]``, detached.

        Raises:
            FeatureError: if there is no datum.
        """
        if said.key not in self._rows:
            rows = said.rows([call.features.detach() for call in said.calls])
            if rows.shape[0] == 0:
                raise FeatureError(
                    f"task {said.name!r}: the batch is empty: skip it, or drop the last batch of "
                    f"the loader."
                )
            self._rows[said.key] = said.name, rows
        return self._rows[said.key][1]

    def sums(self) -> list[Tensor]:
        """One number each that is finite if, but for overflow, all features are."""
        some = [rows for _, rows in self._rows.values()]
        if len(some) > _MANY:
            some = [torch.cat([rows.flatten() for rows in some])]
        return [rows.sum(dtype=_wide(rows)) for rows in some]

    def raise_not_finite(self) -> None:
        """Name a head that reads non-finite features; looks at the device.

        Raises:
            FeatureError: if there is one.
        """
        for name, rows in self._rows.values():
            if not bool(rows.isfinite().all()):
                raise FeatureError(
                    f"task {name!r}: the representation that its head receives has non-finite "
                    f"values: lower the learning rate, clip gradients, or check the inputs."
                )


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _data_first(tensor: Tensor) -> Tensor:
    """``[C, N, K]`` as ``[N, K, C]``."""
    return tensor.permute(1, 2, 0) if tensor.dim() == 3 else tensor


def labels_of(observed: Observed, found: Found | Read, complete: bool) -> Labels:
    """Labels in the layout that the rest of the library takes."""
    present = None if complete else found.present
    nll = found.nll if complete and isinstance(found, Read) else None
    output, target = _data_first(observed.output), _data_first(found.target)
    return Labels(output, target, found.factor, present, nll)


def make_parts(
    group: Group, labels: Sequence[Labels | None] | Labels | None, features: Features
) -> list[Part]:
    """Parts of a group: heads with labels, those that lack some and own gradients apart.

    Args:
        group: of heads.
        labels: of every head; or of all of them together, ``None`` if they have none.
        features: that the heads read.
    """
    saids, gradient = group.saids, _data_first(group.observed.gradient)
    together = labels is None or isinstance(labels, Labels)
    if together and all([said.key == saids[0].key for said in saids]):
        return [_part(group, saids, gradient, labels, features)]  # type: ignore[arg-type]
    sizes = [said.layout.tasks for said in saids]
    if together:
        labels = [None] * len(saids) if labels is None else labels.split(sizes)  # type: ignore[union-attr]
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, (said, one) in enumerate(zip(saids, labels, strict=True)):  # type: ignore[arg-type]
        partial = one is not None and (one.present is not None or one.factor.shape[0] > 1)
        kinds.setdefault((said.key, one is None, partial), []).append(index)
    parts, pieces = [], gradient.split(sizes, 1)
    for indices in kinds.values():
        chosen = [one for i in indices if (one := labels[i]) is not None]  # type: ignore[index]
        some = [pieces[i] for i in indices]
        own = some[0] if len(some) == 1 else torch.cat(some, 1)
        joined = Labels.join(chosen) if chosen else None
        parts.append(_part(group, [saids[i] for i in indices], own, joined, features))
    return parts


def _part(
    group: Group, saids: list[Said], gradient: Tensor, labels: Labels | None, features: Features
) -> Part:
    slices, calls, start = {}, {}, 0
    for said in saids:
        stop = start + said.layout.tasks
        slices[said.name], calls[said.name], start = slice(start, stop), said.calls, stop
    return Part(
        group.likelihood.kind,
        tuple(calls),
        tuple([said.head for said in saids]),
        saids[0].key,
        calls,
        features.of(saids[0]),
        gradient,
        labels,
        slices,
    )

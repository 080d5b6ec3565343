"""Posteriors of all heads from a loader: one pass through the network, whatever their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from bayesagg.heads import Head, stacked
from bayesagg.posterior import augment
from bayesagg.predicting.classification import laplace
from bayesagg.predicting.data import Rows, Source
from bayesagg.predicting.regression import Prior, Sums, solve
from bayesagg.predicting.state import Inferred, Layout

__all__ = ["fit_heads"]

_CHUNK = 1 << 22


@torch.no_grad()
def fit_heads(
    source: Source,
    heads: Mapping[str, Head],
    priors: Mapping[str, Prior],
    *,
    passes: int,
    max_parameters: int,
) -> dict[str, Inferred]:
    """Posteriors by task.

    Args:
        source: of the data; keeps the features of classifications.
        heads: by task.
        priors: by task.
        passes: Newton passes, at most.
        max_parameters: of an exact curvature of classes.

    Raises:
        BayesAggError: as of :meth:`bayesagg.predicting.data.Source.batches`.
    """
    sums: dict[str, Sums] = {}
    for batch in source.batches():
        for task, new in _sums(batch, source.layouts).items():
            sums[task] = sums[task] + new if task in sums else new
    found = {}
    for task, head in heads.items():
        if head.kind == "regression":
            noise = getattr(head, "noise_variance", None)
            given = float(noise) if isinstance(noise, int | float) else None
            found[task] = solve(sums[task], priors[task], given)
        else:
            found[task] = laplace(
                task,
                head.kind,
                stacked(head),
                head.has_bias,
                lambda task=task: _of_task(source, task),  # type: ignore[misc]
                priors[task],
                passes=passes,
                max_parameters=max_parameters,
            )
    return found


def _of_task(source: Source, task: str) -> Iterator[Rows]:
    return (batch[task] for batch in source.batches() if task in batch)


def _sums(batch: Mapping[str, Rows], layouts: Mapping[str, Layout]) -> dict[str, Sums]:
    """Of the regressions of a batch; heads on the same features share the Gram matrix."""
    grams: dict[tuple[int, bool], Tensor] = {}
    found: dict[str, Sums] = {}
    for task, rows in batch.items():
        if layouts[task].kind != "regression":
            continue
        bias = layouts[task].bias
        key = (id(rows.features), bias)
        shared = grams.get(key) if rows.present is None else None
        size = max(1, _CHUNK // rows.features.shape[1])
        parts = list(_chunks(rows, size))
        new = None
        for part in parts:
            h = augment(part.features.double(), bias)
            gram = None if shared is None else (shared if new is None else torch.zeros_like(shared))
            one = Sums.of(h, part.targets, part.present, gram)
            new = one if new is None else new + one
        assert new is not None
        if rows.present is None:
            grams[key] = new.gram
        found[task] = new
    return found


def _chunks(rows: Rows, size: int) -> Iterable[Rows]:
    if len(rows.features) <= size:
        return [rows]
    present = rows.present
    masks = [None] * len(rows.features) if present is None else present.split(size)
    pieces = zip(rows.features.split(size), rows.targets.split(size), masks, strict=False)
    return [Rows(*piece) for piece in pieces]

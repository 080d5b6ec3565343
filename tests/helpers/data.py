"""Batches, their losses, and labels that are missing."""

import functools
import warnings
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.settings import INPUTS, OUTPUTS


def make_batch(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    size: int = 6,
    inputs: int = INPUTS,
    outputs: Mapping[str, int] = OUTPUTS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Inputs and labels; drawn on the CPU, so that every device sees the same data."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    labels: dict[str, Tensor] = {}
    for name, o in outputs.items():
        if name == "cls":
            labels[name] = torch.randint(o, (size,), generator=generator).to(device)
        else:
            y = torch.randn(size, o, generator=generator, dtype=torch.float64)
            labels[name] = (y if name == "reg" else (y > 0)).to(device=device, dtype=dtype)
    return x.to(device=device, dtype=dtype), labels


LOSSES = {"reg": F.mse_loss, "bin": F.binary_cross_entropy_with_logits, "cls": F.cross_entropy}


def make_losses(
    out: Mapping[str, Tensor], labels: Mapping[str, Tensor], reduction: str = "mean"
) -> dict[str, Tensor]:
    """The loss of every output, by task."""
    return {name: LOSSES[name](out[name], labels[name], reduction=reduction) for name in out}


def without(labels: Mapping[str, Tensor], name: str, gaps: Tensor) -> dict[str, Tensor]:
    """Labels of which those of one task are missing in some rows, or single entries."""
    y = labels[name]
    gaps = gaps if gaps.dim() == y.dim() else gaps[:, None].expand_as(y)
    return {**labels, name: y.masked_fill(gaps, -100 if name == "cls" else torch.nan)}


def ignore(
    labels: Mapping[str, Tensor], seed: int, rate: float = 1 / 3
) -> tuple[Mapping[str, Tensor], Tensor]:
    """Some labels of every task are missing, each of its own; and which, ``[3, N]``."""
    generator = torch.Generator().manual_seed(seed)
    missing = torch.rand(3, len(labels["cls"]), generator=generator) < rate
    missing = missing.to(labels["cls"].device)
    for name, gaps in zip(labels, missing, strict=True):
        labels = without(labels, name, gaps)
    return labels, missing


def losses_over(
    out: Mapping[str, Tensor], labels: Mapping[str, Tensor], reduction: str = "mean"
) -> dict[str, Tensor]:
    """Means (or sums) over the labels that there are; zero where there is none."""
    losses = {}
    for name, z in out.items():
        y = labels[name]
        known = y != -100 if name == "cls" else ~y.isnan()
        loss = functools.partial(LOSSES[name], reduction=reduction)
        losses[name] = loss(z[known], y[known]) if bool(known.any()) else z.sum() * 0
    return losses


def skip_without_losses(dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Skip the test where this PyTorch has no squared or absolute errors in a precision."""
    out = torch.ones(2, dtype=dtype, device=device, requires_grad=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are slow
            loss = F.mse_loss(out, out.detach())
            (loss + F.smooth_l1_loss(out, out.detach())).backward()
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        pytest.skip(str(error))

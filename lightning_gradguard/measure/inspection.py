"""A closer look at single elements, on an incident: NaN and infinities counted, norms that float32 can't hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.layout import Floats
from lightning_gradguard.measure.distributed import Ranks
from lightning_gradguard.record import Measurement


def inspect(
    measurement: Measurement, tensors: Sequence[Tensor], shares: Tensor | None = None, ranks: Ranks | None = None
) -> Measurement:
    """Tell damage from a norm that is only too large, since the global norm is not finite.

    Reads the host a few times and allocates copies of single tensors. Three collectives where gradients are sharded.

    Args:
        measurement: with a global norm that is NaN or infinite.
        tensors: the gradients of the parameters that have one, on this rank.
        shares: which share of each counts here in a sum over ranks, [num_tensors]; None where nothing is sharded.
        ranks: those that share them.

    Returns:
        The measurement with `nonfinite` or `overflowed` set, `max_abs`, and norms that are right wherever the elements
        are finite.
    """
    together = ranks if ranks is not None and shares is not None else Ranks()
    weights = torch.ones(len(tensors), 1, dtype=torch.float64) if shares is None else shares.cpu().double().view(-1, 1)
    device = tensors[0].device
    found = torch.stack([_count(tensor).cpu() for tensor in tensors])
    # Rounded up: of replicas that should be alike, but are not, any one with damage counts.
    counts = np.ceil(together.sum_((found[:, :2] * weights).to(device)).cpu().numpy())
    max_abs = together.max_(found[:, 2].contiguous().to(device)).cpu()  # gloo takes the memory of a strided view as it lies
    norms = measurement.norms.copy()
    present = np.flatnonzero(measurement.has_grad)
    squares = torch.stack([_scaled_square(*pair).cpu() for pair in zip(tensors, max_abs, strict=True)])
    scaled = together.sum_((squares.view(-1, 1) * weights).to(device)).cpu().squeeze(1)
    exact: Floats = (scaled.sqrt() * max_abs).numpy()
    damaged = counts.sum(axis=1) > 0
    norms[present] = np.where(damaged, norms[present], exact)
    reports = [
        ParameterReport(measurement.names[present[row]], float(norms[present[row]]), int(num_nan), int(num_inf))
        for row, (num_nan, num_inf) in enumerate(counts)
        if damaged[row]
    ]
    return replace(
        measurement,
        norms=norms,
        global_norm=_global_norm(norms, counts),
        nonfinite=tuple(sorted(reports, key=lambda report: -(report.num_nan + report.num_inf))),
        overflowed=not reports,
        damage=measurement.damage if reports or _has_bad_loss(measurement) else None,
        max_abs=float(max_abs.max()),
    )


def _has_bad_loss(measurement: Measurement) -> bool:
    return measurement.damage is not None and measurement.damage.loss is not None


def _global_norm(norms: Floats, counts: Floats) -> float:
    num_nan, num_inf = counts.sum(axis=0)
    if num_nan or num_inf:
        return math.nan if num_nan else math.inf
    largest = norms.max()
    return float(largest * np.linalg.norm(norms / largest))


def _count(tensor: Tensor) -> Tensor:
    """[number of NaN, number of infinities, largest finite magnitude] of a tensor, float64 [3]."""
    magnitude = tensor.abs() if tensor.dtype.itemsize > 1 else tensor.float().abs()
    num_nan, num_inf = magnitude.isnan().sum(), magnitude.isinf().sum()
    finite = torch.where(magnitude.isfinite(), magnitude, 0)
    largest = finite.max() if finite.numel() else finite.new_zeros(())
    return torch.stack([num_nan.double(), num_inf.double(), largest.double()])


def _scaled_square(tensor: Tensor, largest: Tensor) -> Tensor:
    """Sum of the squares of a tensor's elements over its largest one, float64, so that they can't overflow."""
    magnitude = tensor.abs() if tensor.dtype.itemsize > 1 else tensor.float().abs()
    return (magnitude.double() / largest.clamp(min=math.ulp(0.0)).to(magnitude.device)).square().sum()

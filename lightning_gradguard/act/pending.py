"""A step whose facts are still on their way from the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.measure.measurement import Facts, look_closer
from lightning_gradguard.record import Measurement, Position


@dataclass(frozen=True, eq=False)
class PendingStep:
    """What has to be kept of a step that the device decides by itself, until the host learns of it.

    Attributes:
        position: where in the training.
        facts: what was measured; only its shapes are used from here on.
        present: which parameters have a gradient.
        layout: names and sizes of the parameters.
        histogram: its counts on the host, [num_tensors, row]; None on most steps.
    """

    position: Position
    facts: Facts
    present: Bools
    layout: Layout
    histogram: Tensor | None
    _values: Tensor
    _landed: torch.cuda.Event | None

    @classmethod
    def start(cls, position: Position, facts: Facts, coef: Tensor, present: Bools, layout: Layout) -> PendingStep:
        """Queue one copy of all facts into pinned memory. No sync."""
        values = _to_host(torch.cat([facts.pack(), coef.reshape(1).to(facts.norms.dtype)]))
        histogram = None if facts.histogram is None else _to_host(facts.histogram)
        landed = None
        if facts.norms.is_cuda:
            landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            landed.record()
        return cls(position, facts, present, layout, histogram, values, landed)

    def land(self, gradients: Gradients | None = None) -> tuple[Measurement, Clipped]:
        """Wait for the copy, and read it. When a step later, it has been there for long as a rule.

        Args:
            gradients: what was measured, if it is still there; on an incident it is looked at more closely.
        """
        if self._landed is not None:
            self._landed.synchronize()
        values: Floats = self._values.double().numpy()
        measurement = self.facts.unpack(values[:-1], self.present, self.layout)
        if gradients is not None:
            measurement = look_closer(measurement, gradients)
        elif not math.isfinite(measurement.global_norm):
            measurement = _from_norms(measurement)
        return measurement, Clipped(coef=float(values[-1]), norm=measurement.global_norm * float(values[-1]))


def _to_host(tensor: Tensor) -> Tensor:
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return target.copy_(tensor.detach(), non_blocking=True)


def _from_norms(measurement: Measurement) -> Measurement:
    """Name the damaged parameters by their norms: the gradients themselves are gone by now.

    A count of 1 stands for "at least one". An infinite norm may also be one that float32 can't hold.
    """
    norms = measurement.norms
    reports = tuple(
        ParameterReport(
            measurement.names[index],
            float(norms[index]),
            num_nan=int(np.isnan(norms[index])),
            num_inf=int(np.isinf(norms[index])),
        )
        for index in np.flatnonzero(~np.isfinite(norms))
    )
    if reports:
        return replace(measurement, nonfinite=reports)
    largest = norms.max()
    return replace(measurement, global_norm=float(largest * np.linalg.norm(norms / largest)), overflowed=True, damage=None)

"""A step between its measuring and its decision: the host has yet to learn the figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.layout import Bools, Floats, Layout
from lightning_gradguard.measure.measurement import Facts, look_closer
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Measurement, Position


@dataclass(frozen=True, eq=False)
class Transfer:
    """Figures on their way from the device to the host, copied without a sync.

    Attributes:
        values: `Facts.pack()` and the factor of clipping, [n + 1].
        histogram: counts before or after clipping, [num_tensors, row]; None on most steps.
    """

    values: Tensor
    histogram: Tensor | None
    _done: torch.cuda.Event | None

    @classmethod
    def start(cls, facts: Facts, coef: Tensor, clipped_histogram: Tensor | None = None) -> Transfer:
        """Queue one copy of all figures into pinned memory."""
        values = _to_host(facts.pack(coef))
        counts = facts.histogram if clipped_histogram is None else clipped_histogram
        histogram = None if counts is None else _to_host(counts)
        done = None
        if facts.norms.is_cuda:  # pragma: no cover - needs a GPU
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return cls(values, histogram, done)

    def wait(self) -> Floats:
        """The values, float64 [n + 1]. A step later they have been there for long as a rule."""
        if self._done is not None:  # pragma: no cover - needs a GPU
            self._done.synchronize()
        values: Floats = self.values.double().numpy()
        return values


class PendingStep(NamedTuple):
    """A measured step of which the host has yet to learn.

    Attributes:
        position: where in the training.
        facts: what was measured.
        layout: names and sizes of the parameters.
        present: which parameters have a gradient.
        step: the step with its gradients; None once they may be gone, because the device decides by itself.
        transfer: the figures on their way, with the factor that the device clips by; None: nothing has been queued.
        counts_clipped: whether elements are counted after clipping.
        skips_damage: whether the device skips the step where the norm is not finite.
    """

    position: Position
    facts: Facts
    layout: Layout
    present: Bools
    step: MeasuredStep | None
    transfer: Transfer | None = None
    counts_clipped: bool = False
    skips_damage: bool = False

    @classmethod
    def of(
        cls,
        step: MeasuredStep,
        transfer: Transfer | None = None,
        *,
        is_left_to_device: bool = False,
        skips_damage: bool = False,
    ) -> PendingStep:
        """From a measured step.

        Args:
            step: the step.
            transfer: its figures on their way; None: they are read when they are asked for.
            is_left_to_device: whether the device decides by itself, so that the gradients must not be kept alive.
            skips_damage: whether the device skips the step where the norm is not finite.
        """
        kept = None if is_left_to_device else step
        counts_clipped = step.clipped_histogram is not None
        return cls(
            step.position, step.facts, step.layout, step.gradients.present, kept, transfer, counts_clipped, skips_damage
        )

    @property
    def is_left_to_device(self) -> bool:
        """Whether the device decides by itself."""
        return self.step is None

    @property
    def histogram(self) -> Tensor | None:
        """What was counted so far, [num_tensors, row]; None on most steps."""
        return self.facts.histogram if self.transfer is None else self.transfer.histogram

    def read(self) -> Measurement:
        """The figures on the host; on an incident more of them. At most one sync."""
        if self.transfer is None:
            assert self.step is not None
            return self.facts.read(self.step.gradients, self.layout)
        measurement = self.facts.unpack(self.transfer.wait()[:-1], self.present, self.layout)
        if self.step is not None:
            return look_closer(measurement, self.step.gradients)
        return measurement if math.isfinite(measurement.global_norm) else self._from_norms(measurement)

    def _from_norms(self, measurement: Measurement) -> Measurement:
        """Name the parameters whose norms are not finite: the gradients themselves are gone by now, and can't be counted.

        A step that the device has skipped as a damaged one is not told apart from one whose norm float32 can't hold.
        """
        norms = measurement.norms
        reports = [
            ParameterReport(measurement.names[index], float(norms[index]), num_nan=int(np.isnan(norms[index])))
            for index in np.flatnonzero(~np.isfinite(norms))
        ]
        if reports or self.skips_damage:
            worst_first = tuple(sorted(reports, key=lambda report: -report.num_nan))
            return replace(measurement, nonfinite=worst_first, is_counted=False)
        largest = norms.max()
        global_norm = float(largest * np.linalg.norm(norms / largest))
        return replace(measurement, global_norm=global_norm, overflowed=True, damage=None)

    def coef(self) -> float:
        """The factor that the device has clipped by. It waits as `read` does."""
        assert self.transfer is not None
        return float(self.transfer.wait()[-1])


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.is_meta:  # has no values to copy; tests prove by it that nothing waits
        return tensor
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return target.copy_(tensor.detach(), non_blocking=True)

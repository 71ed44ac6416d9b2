"""Decisions that a GPU takes by itself, inside a fused optimizer's kernel; the host learns of them a step later."""

from __future__ import annotations

from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep, Transfer
from lightning_gradguard.act.queued import Queued
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


class OnDevice:
    """Clips and skips without a sync, by comparing with what is known before the step; where that is not enough, `Queued`.

    Args:
        gate: of a fused optimizer whose clipper needs no host.
    """

    wants_threshold = True

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._queued = Queued(gate)

    def begin_(self, step: MeasuredStep, threshold: SkipThreshold | None) -> PendingStep:
        """Queue clipping, skipping, and the copy of the figures."""
        kernel = self._gate.kernel
        if threshold is None or kernel is None or not kernel.can_skip:
            return self._queued.begin_(step, threshold)
        kernel.skip(step.facts.exceeds(threshold.max_norm, must_be_finite=threshold.must_be_finite))
        self._gate.buffers.remember()
        coef = self._gate.coefficient(step)
        kernel.scale(coef)
        return PendingStep.of(step, Transfer.start(step.facts, coef), is_left_to_device=True)

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Repair buffers or take them for good, now that it is known what the device has done."""
        if not pending.is_left_to_device:
            return self._queued.finish_(pending, measurement, decision)
        if decision.skip:
            self._gate.buffers.repair_()
            return Clipped(coef=1.0, norm=measurement.global_norm)
        self._gate.buffers.confirm()
        coef = pending.coef()
        return Clipped(coef, norm=measurement.global_norm * coef)

    def detach(self) -> None:
        """It has none."""

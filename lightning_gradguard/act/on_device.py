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
        buffers = self._gate.buffers
        if threshold is None or kernel is None or not kernel.can_skip or not buffers.can_select:
            return self._queued.begin_(step, threshold)
        is_bad = step.facts.exceeds(threshold.max_norm, must_be_finite=threshold.must_be_finite)
        kernel.skip(is_bad)
        # Before the next forward pass can read them, and the host knows of nothing.
        buffers.select_(is_bad)
        buffers.note_boundary()
        coef = self._gate.coefficient(step, skips_damage=threshold.must_be_finite)
        kernel.scale(coef)
        transfer = Transfer.start(step.facts, coef, self._gate.clipped_histogram(step))
        return PendingStep.of(step, transfer, is_left_to_device=True, skips_damage=threshold.must_be_finite)

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Say what the device has done."""
        if not pending.is_left_to_device:
            return self._queued.finish_(pending, measurement, decision)
        coef = 1.0 if decision.skip else pending.coef()
        return Clipped(coef, norm=measurement.global_norm * coef)

    def leave(self) -> None:
        """The optimizer is not inside its step, or ends it by itself."""

    def detach(self) -> None:
        """It has none."""

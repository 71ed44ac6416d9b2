"""Decisions that are carried out once the host has read the figures: on a CPU, and where a clipper needs the host."""

from __future__ import annotations

from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


class OnHost:
    """Reads, decides, then clips or skips. On a GPU it waits twice: for the figures, and for the clipped norm.

    Args:
        gate: of the optimizer.
    """

    wants_threshold = False

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def begin_(self, step: MeasuredStep, threshold: SkipThreshold | None) -> PendingStep:  # noqa: ARG002 - the protocol
        """Nothing is queued."""
        return PendingStep.of(step)

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Clip, or skip."""
        if decision.skip:
            self._gate.skip_()
            return Clipped(coef=1.0, norm=measurement.global_norm)
        assert pending.step is not None
        clipped = self._gate.clip_(pending.step, measurement)
        self._gate.buffers.note_boundary()
        return clipped

    def leave(self) -> None:
        """The optimizer is not inside its step, or ends it by itself."""

    def detach(self) -> None:
        """It has none."""

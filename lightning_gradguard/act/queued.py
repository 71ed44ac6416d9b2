"""Clipping that is queued on a GPU before the host knows the norm, so that the host need wait only once."""

from __future__ import annotations

from lightning_gradguard.act.gate import Gate
from lightning_gradguard.act.pending import PendingStep, Transfer
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


class Queued:
    """Clips at once; the host decides whether the step is applied.

    Args:
        gate: of an optimizer whose clipper needs no host.
    """

    wants_threshold = False

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def begin_(self, step: MeasuredStep, threshold: SkipThreshold | None) -> PendingStep:  # noqa: ARG002 - the protocol
        """Queue the clipping, and the copy of the figures."""
        gate = self._gate
        coef = gate.coefficient(step)
        if gate.clipper is not None and gate.kernel is not None:
            gate.kernel.scale(coef)
        elif gate.clipper is not None:
            step.gradients.scale_(coef)
        return PendingStep.of(step, Transfer.start(step.facts, coef, gate.clipped_histogram(step)))

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Skip, or let the clipped gradients through."""
        if decision.skip:
            self._gate.skip_()
            return Clipped(coef=1.0, norm=measurement.global_norm)
        if measurement.overflowed and pending.step is not None:  # the device could not know the norm
            clipped = self._gate.clip_(pending.step, measurement)
        else:
            coef = pending.coef()
            clipped = Clipped(coef, norm=measurement.global_norm * coef)
        self._gate.buffers.note_boundary()
        return clipped

    def leave(self) -> None:
        """The optimizer is not inside its step, or ends it by itself."""

    def detach(self) -> None:
        """It has none."""

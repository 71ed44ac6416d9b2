"""How a decision reaches the optimizer: the protocol of all ways, and which one an optimizer gets."""

from __future__ import annotations

from typing import Protocol

from lightning_gradguard.act.pending import PendingStep
from lightning_gradguard.clippers import Clipped
from lightning_gradguard.judge.judge import SkipThreshold
from lightning_gradguard.measure.step import MeasuredStep
from lightning_gradguard.record import Decision, Measurement


class Executor(Protocol):
    """Carries out decisions about one optimizer's steps.

    Attributes:
        wants_threshold: whether the device may decide by itself, given what a step must not exceed.
    """

    wants_threshold: bool

    def begin_(self, step: MeasuredStep, threshold: SkipThreshold | None) -> PendingStep:
        """Queue what can be done before the host knows the figures. No sync.

        Args:
            step: the step.
            threshold: what it must not exceed; None: the host has to decide.
        """

    def finish_(self, pending: PendingStep, measurement: Measurement, decision: Decision) -> Clipped:
        """Carry out what was decided, or take note of what the device has done."""

    def leave(self) -> None:
        """Take the optimizer out of a bad step that it is inside of; the last thing to do about a step."""

    def detach(self) -> None:
        """Take its own hooks off the optimizer."""

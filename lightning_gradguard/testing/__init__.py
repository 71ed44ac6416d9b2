"""Rehearse what goes wrong, in your own set-up: a damaged gradient, a killed process; and a guard in every Trainer."""

from lightning_gradguard.testing.faults import FaultName, inject
from lightning_gradguard.testing.kills import KillReport, Outcome, differences, kill_and_resume
from lightning_gradguard.testing.suites import everywhere

__all__ = ["FaultName", "KillReport", "Outcome", "differences", "everywhere", "inject", "kill_and_resume"]

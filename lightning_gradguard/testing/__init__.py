"""Rehearse what goes wrong, in your own set-up: a damaged gradient, and a process that is killed."""

from lightning_gradguard.testing.faults import FaultName, inject
from lightning_gradguard.testing.kills import KillReport, Outcome, differences, kill_and_resume

__all__ = ["FaultName", "KillReport", "Outcome", "differences", "inject", "kill_and_resume"]

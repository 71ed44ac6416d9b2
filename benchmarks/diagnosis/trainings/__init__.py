"""Trainings whose cause of vanishing or explosion is known."""

from benchmarks.diagnosis.trainings import checked, mistaken_explosions, mistaken_vanishing
from benchmarks.diagnosis.trainings.base import CHECKED, MISTAKEN, NO_CAUSE

__all__ = ["CHECKED", "MISTAKEN", "NO_CAUSE", "checked", "mistaken_explosions", "mistaken_vanishing"]

"""Trainings whose cause of vanishing or explosion is known."""

from benchmarks.diagnosis.trainings import checked, further_causes, further_healthy, mistaken_explosions, mistaken_vanishing
from benchmarks.diagnosis.trainings.base import CHECKED, FURTHER, FURTHER_HEALTHY, MISTAKEN, NO_CAUSE, NOT_ON_THE_LIST

__all__ = [
    "CHECKED",
    "FURTHER",
    "FURTHER_HEALTHY",
    "MISTAKEN",
    "NOT_ON_THE_LIST",
    "NO_CAUSE",
    "checked",
    "further_causes",
    "further_healthy",
    "mistaken_explosions",
    "mistaken_vanishing",
]

"""Small labelled trainings on real data: healthy ones, and ones with a known fault from a known step on."""

from benchmarks.detection.trainings import adversarial, explosions, fresh, healthy, late, nonfinite, second, third, vanishing
from benchmarks.detection.trainings.base import KINDS, STEPS, Kind, Training

__all__ = [
    "KINDS",
    "STEPS",
    "Kind",
    "Training",
    "adversarial",
    "explosions",
    "fresh",
    "healthy",
    "late",
    "nonfinite",
    "second",
    "third",
    "vanishing",
]

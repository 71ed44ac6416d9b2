"""What judges a step: one file each."""

from lightning_gradguard.detectors.base import Deferral, Detector
from lightning_gradguard.detectors.explosion import Explosion
from lightning_gradguard.detectors.nonfinite import NonFinite
from lightning_gradguard.detectors.overflow import Overflow
from lightning_gradguard.detectors.update_ratio import UpdateRatio
from lightning_gradguard.detectors.vanishing import Vanishing

__all__ = ["Deferral", "Detector", "Explosion", "NonFinite", "Overflow", "UpdateRatio", "Vanishing"]

"""What makes gradients smaller: one file each."""

from lightning_gradguard.clippers.base import Clipped, Clipper, FactorClipper
from lightning_gradguard.clippers.norm import ClipNorm
from lightning_gradguard.clippers.value import ClipValue

__all__ = ["ClipNorm", "ClipValue", "Clipped", "Clipper", "FactorClipper"]

"""What makes gradients smaller: one file each."""

from lightning_gradguard.clippers.adagc import AdaGC
from lightning_gradguard.clippers.agc import AGC
from lightning_gradguard.clippers.autoclip import AutoClip
from lightning_gradguard.clippers.base import Clipped, Clipper, FactorClipper
from lightning_gradguard.clippers.grouped import Grouped
from lightning_gradguard.clippers.norm import ClipNorm
from lightning_gradguard.clippers.parameter_norm import ClipParameterNorm
from lightning_gradguard.clippers.value import ClipValue
from lightning_gradguard.clippers.zclip import ZClip

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipNorm",
    "ClipParameterNorm",
    "ClipValue",
    "Clipped",
    "Clipper",
    "FactorClipper",
    "Grouped",
    "ZClip",
]

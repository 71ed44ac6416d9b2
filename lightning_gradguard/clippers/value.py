"""Clipping of single elements."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_gradguard.clippers.base import Clipped, Clipper
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.policy import require_float


class ClipValue(Clipper):
    """Clamp every gradient element to [-clip_value, clip_value].

    Equal to `torch.nn.utils.clip_grad_value_` to the last bit; unlike it, complex gradients work (real and
    imaginary part are clamped apart). It changes the gradient's direction, and costs a second pass of norms.

    Args:
        clip_value: largest magnitude of an element, > 0.

    Raises:
        ValueError: for a value outside this range.

    >>> ClipValue(0.5)
    ClipValue(clip_value=0.5)
    """

    def __init__(self, clip_value: float) -> None:
        require_float("clip_value", clip_value, above=0.0, remedy="To measure without clipping pass `clip=None`.")
        self.clip_value = float(clip_value)

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Clamp in place, then measure again; two syncs. NaN stays NaN."""
        before = float(global_norm)
        gradients.clamp_(self.clip_value)
        after = float(gradients.total_norm())
        is_smaller = math.isfinite(before) and after < before
        return Clipped(coef=after / before if is_smaller else 1.0, norm=after)

    def __repr__(self) -> str:
        return f"ClipValue(clip_value={self.clip_value})"

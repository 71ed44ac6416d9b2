"""Clipping of each gradient by its own norm."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clipped, Clipper, clip_each_
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.policy import require_float

# torch adds it to the norm (torch/nn/utils/clip_grad.py); the same value keeps the results equal.
_EPS = 1e-6


class ClipParameterNorm(Clipper):
    """Scale each parameter's gradient by its own factor, so that its norm is at most `max_norm`.

    Equal to `torch.nn.utils.clip_grad_norm_` called for each parameter alone. It changes the direction of the whole
    gradient; a tensor that explodes leaves the others as they are. A tensor with a NaN or an infinity is left as it is.

    Args:
        max_norm: largest norm of one tensor that passes unchanged, > 0.
        norm_type: the p of the p-norm, > 0, infinity included. Any other than 2 costs one more pass over the gradients,
            since the guard measures 2-norms.

    Raises:
        ValueError: for values outside these ranges.

    >>> ClipParameterNorm(1.0)
    ClipParameterNorm(max_norm=1.0, norm_type=2.0)
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        require_float("max_norm", max_norm, above=0.0, remedy="To measure without clipping pass `clip=None`.")
        require_float("norm_type", norm_type, above=0.0, infinite=True, remedy="The default, 2.0, is the usual norm.")
        self.max_norm = float(max_norm)
        self.norm_type = float(norm_type)

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Multiply each gradient by its factor, in place; a sync, two for another norm than 2."""
        norms = gradients.tensor_norms().cpu()
        judged = norms
        if self.norm_type != 2.0:
            judged = gradients.tensor_norms(self.norm_type).cpu()
            # High powers overflow early; for p > 2 the 2-norm is an upper bound of the p-norm.
            judged = torch.where(judged.isfinite(), judged, norms)
        coefs = torch.clamp(self.max_norm / (judged + _EPS), max=1.0)
        return clip_each_(gradients, norms, torch.where(norms.isfinite(), coefs, 1.0), global_norm)

    def __repr__(self) -> str:
        return f"ClipParameterNorm(max_norm={self.max_norm}, norm_type={self.norm_type})"

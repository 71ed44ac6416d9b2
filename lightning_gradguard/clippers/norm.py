"""Clipping by the global norm."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_gradguard.clippers.base import FactorClipper
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.policy import require_float

# torch adds it to the norm (torch/nn/utils/clip_grad.py); the same value keeps the results equal.
_EPS = 1e-6
_EPS_FLOAT, _ONE = np.float32(_EPS), np.float32(1.0)
_MAX_FLOAT = float(np.finfo(np.float32).max)


class ClipNorm(FactorClipper):
    """Scale all gradients by one factor, so that their joint norm is at most `max_norm`.

    Equal to `torch.nn.utils.clip_grad_norm_` to the last bit where all gradients are float32 on one device. In half
    precision torch rounds the norm itself to half precision; here it stays float32, so the factors differ by that.

    Args:
        max_norm: largest norm that passes unchanged, > 0.
        norm_type: the p of the p-norm, > 0, infinity included. Any other than 2 costs one more pass over the gradients,
            since the guard measures 2-norms.

    Raises:
        ValueError: for values outside these ranges.

    References:
        R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks", arXiv:1211.5063, 2013.

    >>> ClipNorm(1.0).coefficient(Gradients([]), torch.tensor(4.0))
    tensor(0.2500)
    """

    def __init__(self, max_norm: float, norm_type: float = 2.0) -> None:
        require_float("max_norm", max_norm, above=0.0, remedy="To measure without clipping pass `clip=None`.")
        require_float("norm_type", norm_type, above=0.0, infinite=True, remedy="The default, 2.0, is the usual norm.")
        self.max_norm = float(max_norm)
        self.norm_type = float(norm_type)

    def coefficient(self, gradients: Gradients, global_norm: Tensor) -> Tensor:
        """`max_norm / (norm + 1e-6)`, at most 1."""
        norm = global_norm
        if self.norm_type != 2.0:
            norm = gradients.total_norm(self.norm_type)
            # High powers overflow early; for p > 2 the 2-norm is an upper bound of the p-norm.
            norm = torch.where(norm.isfinite(), norm, global_norm.to(norm))
        return torch.clamp(self.max_norm / (norm + _EPS), max=1.0)

    def coefficient_on_host(self, global_norm: float) -> float | None:
        """The same in float32 of numpy, rounded as torch does: it divides by the norm, and multiplies then."""
        if self.norm_type != 2.0 or self.max_norm > _MAX_FLOAT or type(self).coefficient is not ClipNorm.coefficient:
            return None
        inverse = _ONE / (np.float32(global_norm) + _EPS_FLOAT)
        return min(float(inverse * np.float32(self.max_norm)), 1.0)

    def passes(self, global_norm: float) -> bool:
        """Whether the norm is safely below `max_norm`, whatever rounding does; saves the healthy step three kernels."""
        return self.norm_type == 2.0 and global_norm + _EPS < 0.999 * self.max_norm

    def __repr__(self) -> str:
        return f"ClipNorm(max_norm={self.max_norm}, norm_type={self.norm_type})"

"""Clipping of each gradient by its own history."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import Clipped, Clipper, clip_each_
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.policy import require_decay, require_float, require_int
from lightning_gradguard.statistics.baseline import NamedBaselines


class AdaGC(Clipper):
    """Scale each parameter's gradient by its own factor, so that its norm is at most `ratio` times its own history.

    The history of a tensor is an exponential moving mean of its norms after clipping. In its first `warmup_steps` steps it
    is the smallest of them, and all tensors in their warm-up are scaled by one factor, `max_norm` over the joint norm.

    It follows the paper but for this: a norm that is NaN, infinite or exactly 0 never enters, and is no step of the
    warm-up. A zero would make the paper's threshold 0, and freeze the tensor for good. A tensor that turns up later
    (unfrozen, or an expert without tokens so far) has a warm-up of its own.

    Args:
        ratio: largest norm that passes unchanged, over the history, > 1; close to 1 it grows slowly.
        decay: weight on the past, in (0, 1); close to 1 it follows slowly.
        warmup_steps: for each tensor, >= 1.
        max_norm: largest joint norm in the warm-up, > 0.

    Raises:
        ValueError: for values outside these ranges.

    References:
        G. Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping", arXiv:2502.11034, 2025.

    >>> AdaGC()
    AdaGC(ratio=1.05, decay=0.98, warmup_steps=100, max_norm=1.0)
    """

    def __init__(self, ratio: float = 1.05, decay: float = 0.98, warmup_steps: int = 100, max_norm: float = 1.0) -> None:
        require_float("ratio", ratio, above=1.0, remedy="The paper's choice is 1.05.")
        require_decay(decay, default=0.98)
        require_int("warmup_steps", warmup_steps, at_least=1, remedy="The paper's choice is 100.")
        require_float("max_norm", max_norm, above=0.0, remedy="It limits the joint norm in the warm-up; 1.0 is usual.")
        self.ratio = float(ratio)
        self.decay = float(decay)
        self.warmup_steps = warmup_steps
        self.max_norm = float(max_norm)
        self._history = NamedBaselines(decay=self.decay, warmup_steps=warmup_steps)

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Multiply each gradient by its factor, in place; two syncs."""
        norms = gradients.tensor_norms().cpu()
        values = norms.double().tolist()
        joint = float(global_norm)
        is_finite = math.isfinite(joint)
        common = min(self.max_norm / joint, 1.0) if is_finite and joint > 0.0 else 1.0
        names = gradients.names
        coefs = [
            common if mean is None else min(self.ratio * mean / norm, 1.0) if 0.0 < norm < math.inf else 1.0
            for mean, norm in zip(self._history.values(names), values, strict=True)
        ]
        if is_finite:
            self._history.add(names, [coef * norm for coef, norm in zip(coefs, values, strict=True)])
        return clip_each_(gradients, norms, torch.tensor(coefs, dtype=torch.float64), global_norm)

    def state_dict(self) -> dict[str, Any]:
        """The history, by parameter name."""
        return self._history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._history.load_state_dict(state)

    def __repr__(self) -> str:
        return f"AdaGC(ratio={self.ratio}, decay={self.decay}, warmup_steps={self.warmup_steps}, max_norm={self.max_norm})"

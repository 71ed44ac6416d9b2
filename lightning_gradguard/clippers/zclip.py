"""Clipping of norms that are outliers among those before."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import FactorClipper
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.policy import require_decay, require_float, require_int
from lightning_gradguard.statistics.baseline import ExponentialBaseline


class ZClip(FactorClipper):
    """Scale all gradients by one factor where their joint norm is an outlier: the further out, the smaller.

    A norm more than `z` standard deviations above the moving mean, at z-score s, is brought to the mean plus `z`^2 / s
    standard deviations; whatever comes out, to `max_norm` at most. What enters the moving mean and variance is the norm
    after the first of the two. In the first `warmup_steps` steps only `max_norm` clips; mean and variance begin with
    theirs. A norm that is NaN, infinite or exactly 0 never enters, and is no step of the warm-up.

    The rule and defaults are those of the authors' code but for one detail: it adds 1e-6 to the standard deviation, which
    ties the z-score to the loss's units. Here, as in the paper, nothing is added.

    Args:
        z: standard deviations above the mean that pass unchanged, > 0.
        decay: weight on the past, in (0, 1); close to 1 it follows slowly.
        warmup_steps: >= 2, since one norm has no variance.
        max_norm: largest norm at any time, > 0; None: no such cap.

    Raises:
        ValueError: for values outside these ranges.

    References:
        A. Kumar, L. Owen, N. R. Chowdhury, F. Guera, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
        arXiv:2504.02507, 2025.

    >>> clipper = ZClip(z=2.0, warmup_steps=2, max_norm=None)
    >>> clipper.learn(1.0)
    >>> clipper.learn(3.0)
    >>> clipper.coefficient(Gradients([]), torch.tensor(6.0)) * 6.0  # z-score 4: 2 + 2 * 2 / 4 * 1
    tensor(3.)
    """

    needs_host: ClassVar[bool] = True

    def __init__(self, z: float = 2.5, decay: float = 0.97, warmup_steps: int = 25, max_norm: float | None = 1.0) -> None:
        require_float("z", z, above=0.0, remedy="The authors' choice is 2.5.")
        require_decay(decay, default=0.97)
        require_int("warmup_steps", warmup_steps, at_least=2, remedy="The authors' choice is 25.")
        if max_norm is not None:
            require_float("max_norm", max_norm, above=0.0, remedy="To clip outliers only pass `max_norm=None`.")
        self.z = float(z)
        self.decay = float(decay)
        self.warmup_steps = warmup_steps
        self.max_norm = None if max_norm is None else float(max_norm)
        self._baseline = ExponentialBaseline(decay=self.decay, warmup_steps=warmup_steps)

    def coefficient(self, gradients: Gradients, global_norm: Tensor) -> Tensor:  # noqa: ARG002 - the base's signature
        """The norm that is allowed over the norm, at most 1. One sync."""
        norm = float(global_norm)
        target = self._without_spike(norm)
        if self.max_norm is not None:
            target = min(target, self.max_norm)
        return torch.full_like(global_norm, target / norm if 0.0 < target < norm else 1.0)

    def learn(self, global_norm: float) -> None:
        """Update mean and variance, by what is left of an outlier."""
        self._baseline.add(self._without_spike(global_norm))

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance, and the norms of the warm-up."""
        return self._baseline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._baseline.load_state_dict(state)

    def __repr__(self) -> str:
        return f"ZClip(z={self.z}, decay={self.decay}, warmup_steps={self.warmup_steps}, max_norm={self.max_norm})"

    def _without_spike(self, norm: float) -> float:
        mean, sigma = self._baseline.mean, math.sqrt(self._baseline.variance)
        if not self._baseline.is_ready or norm - mean <= self.z * sigma:
            return norm
        return mean + self.z**2 * self._baseline.variance / (norm - mean)

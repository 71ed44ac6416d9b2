"""What a clipper is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.measurement import Gradients


@dataclass(frozen=True)
class Clipped:
    """What clipping did.

    Attributes:
        coef: norm after over norm before, in (0, 1].
        norm: global 2-norm after.
    """

    coef: float
    norm: float


class Clipper(ABC):
    """Makes the gradients of one step smaller. Called after the step was measured, and only if it is applied."""

    @abstractmethod
    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Clip in place.

        Args:
            gradients: of one optimizer.
            global_norm: their 2-norm, scalar in float32 or wider; NaN or infinite where the user lets
                such steps pass.
        """

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a checkpoint, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


class FactorClipper(Clipper):
    """A clipper whose rule is one factor for all gradients: say `coefficient`, the rest is here."""

    @abstractmethod
    def coefficient(self, gradients: Gradients, global_norm: Tensor) -> Tensor:
        """The factor in (0, 1], a scalar on the device of `global_norm`. Changes nothing; no sync."""

    def factor(self, gradients: Gradients, global_norm: Tensor) -> tuple[Tensor, Clipped]:
        """The factor, and what clipping by it comes to; changes nothing. One sync.

        A norm that is NaN or infinite says nothing about the finite elements, and a factor computed from it would
        turn [1, inf] into [0, nan]: the factor for such gradients is 1.
        """
        norm = float(global_norm)
        if not math.isfinite(norm):
            return torch.ones_like(global_norm), Clipped(coef=1.0, norm=norm)
        factor = self.coefficient(gradients, global_norm)
        coef = float(factor)
        return factor, Clipped(coef, norm * coef)

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Multiply every gradient by the factor, unless it is 1; one sync."""
        factor, clipped = self.factor(gradients, global_norm)
        if clipped.coef < 1.0:
            gradients.scale_(factor)
        return clipped

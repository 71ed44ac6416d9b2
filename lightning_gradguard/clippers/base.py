"""What a clipper is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gradguard.measure.gradients import Gradients


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
    """Makes the gradients of one step smaller. Called after the step was measured, and only if it is applied.

    One that keeps a history takes each call for a step. What is no step of its own (a further evaluation inside a step of
    LBFGS, a step whose loss or gradients are damaged), the guard takes back, by `load_state_dict`.
    """

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
    """A clipper whose rule is one factor for all gradients: say `coefficient`, the rest is here.

    Attributes:
        needs_host: whether the rule reads the norm on the host, or learns from it. If not, a GPU clips while the host knows
            nothing yet; `learn` is never called then.
    """

    needs_host: ClassVar[bool] = False

    @abstractmethod
    def coefficient(self, gradients: Gradients, global_norm: Tensor) -> Tensor:
        """The factor in (0, 1], a scalar on the device of `global_norm`. Changes nothing; no sync unless `needs_host`."""

    def coefficient_on_host(self, global_norm: float) -> float | None:  # noqa: ARG002
        """What `coefficient` gives for a float32 norm on the CPU, to the last bit, without a kernel; None: ask that."""
        return None

    def passes(self, global_norm: float) -> bool:  # noqa: ARG002
        """Whether the factor for this norm is known to be 1 without computing it; False if in doubt."""
        return False

    def learn(self, global_norm: float) -> None:
        """Take a step's norm into the history, once its factor is known. Only finite norms come here."""

    def factor(self, gradients: Gradients, global_norm: Tensor) -> tuple[Tensor, Clipped]:
        """The factor, and what clipping by it comes to; changes no gradient, but learns from the norm. One sync.

        A norm that is NaN or infinite says nothing about the finite elements, and a factor computed from it would
        turn [1, inf] into [0, nan]: the factor for such gradients is 1.
        """
        norm = float(global_norm)
        if not math.isfinite(norm) or self.passes(norm):
            return torch.ones_like(global_norm), Clipped(coef=1.0, norm=norm)
        factor = self.coefficient(gradients, global_norm)
        coef = float(factor)
        self.learn(norm)
        return factor, Clipped(coef, norm * coef)

    def clip_(self, gradients: Gradients, global_norm: Tensor) -> Clipped:
        """Multiply every gradient by the factor, unless it is 1; one sync."""
        if global_norm.is_cpu and global_norm.dtype is torch.float32:
            norm = global_norm.item()
            coef = self.coefficient_on_host(norm) if math.isfinite(norm) else None
            if coef is not None:
                self.learn(norm)
                if coef < 1.0:
                    # A third of the time that a float takes.
                    gradients.scale_(torch.scalar_tensor(coef, dtype=torch.float32))
                return Clipped(coef, norm * coef)
        factor, clipped = self.factor(gradients, global_norm)
        if clipped.coef < 1.0:
            gradients.scale_(factor)
        return clipped


def clip_each_(gradients: Gradients, norms: Tensor, coefs: Tensor, global_norm: Tensor) -> Clipped:
    """Multiply each gradient by its own factor, in place. No sync where `global_norm` is on the CPU.

    Args:
        gradients: of one optimizer.
        norms: their 2-norms over all ranks, on the CPU [num_tensors].
        coefs: the factors in (0, 1], on the CPU [num_tensors].
        global_norm: 2-norm over all, scalar.
    """
    before = float(global_norm)
    gradients.scale_each_(coefs.tolist())
    if bool((coefs == 1.0).all()):
        return Clipped(coef=1.0, norm=before)
    return clipped_to(before, (norms.double() * coefs.double()).tolist())


def clipped_to(before: float, norms: Sequence[float]) -> Clipped:
    """What clipping did, from the global norm before it and the norms of all parts after."""
    after = math.hypot(*norms)
    is_smaller = math.isfinite(before) and 0.0 < after < before
    return Clipped(coef=after / before if is_smaller else 1.0, norm=after)

"""Clipping by a percentile of the norms so far."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gradguard.clippers.base import FactorClipper
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.policy import require_float, require_int
from lightning_gradguard.statistics.baseline import QuantileBaseline


class AutoClip(FactorClipper):
    """Scale all gradients by one factor, so that their joint norm is at most a percentile of the norms so far.

    The percentile is taken over the unclipped norms of the last `window` applied steps, the present one included, so the
    first step passes unchanged. A norm that is NaN, infinite or exactly 0 never enters. The paper keeps the norms of the
    whole training. Here the default is a window, because a history without end grows in memory and in each checkpoint,
    and because norms fall as a model trains: after a long run the early ones would keep the threshold high for good. Up to
    that many steps both are the same.

    Args:
        percentile: in (0, 100]; 100 never clips, at 10 nine of ten steps are clipped.
        window: norms that are remembered, >= 1; 1 never clips. None: all, as in the paper.

    Raises:
        ValueError: for values outside these ranges.

    References:
        P. Seetharaman, G. Wichern, B. Pardo, J. Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks", arXiv:2007.14469, 2020.

    >>> clipper = AutoClip(percentile=50.0)
    >>> clipper.learn(1.0)
    >>> clipper.coefficient(Gradients([]), torch.tensor(3.0))
    tensor(0.6667)
    """

    needs_host: ClassVar[bool] = True

    def __init__(self, percentile: float = 10.0, window: int | None = 1000) -> None:
        require_float("percentile", percentile, above=0.0, up_to=100.0, remedy="The paper's choice is 10.0.")
        if window is not None:
            require_int("window", window, at_least=1, remedy="To remember all norms, as in the paper, pass None.")
        self.percentile = float(percentile)
        self.window = window
        self._history = QuantileBaseline(window)

    def coefficient(self, gradients: Gradients, global_norm: Tensor) -> Tensor:  # noqa: ARG002 - the base's signature
        """The percentile over the norm, at most 1. One sync."""
        norm = float(global_norm)
        threshold = self._history.percentile(self.percentile, including=norm)
        return torch.full_like(global_norm, threshold / norm if norm > threshold > 0.0 else 1.0)

    def learn(self, global_norm: float) -> None:
        """Remember the norm."""
        self._history.add(global_norm)

    def state_dict(self) -> dict[str, Any]:
        """The norms."""
        return self._history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._history.load_state_dict(state)

    def __repr__(self) -> str:
        return f"AutoClip(percentile={self.percentile}, window={self.window})"

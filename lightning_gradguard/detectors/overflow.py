"""A GradScaler that does not find its scale."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from lightning_gradguard.detectors.base import Deferral, Detector
from lightning_gradguard.policy import Action, ActionName, require_float, require_int
from lightning_gradguard.record import Measurement, Verdict


class Overflow(Detector):
    """Fires when a GradScaler's scale is too large again and again, or has collapsed.

    A scaler finds its scale by overflowing: it then skips the step and halves the scale. That is counted, and no alarm:
    from an initial scale of 2^20 four in a row were seen in a healthy run. Many in a row, or a scale that has shrunk to
    nothing, mean that the gradients themselves are damaged; as long as that lasts, every step is lost, and it is reported
    again after 25, 50, 100, 200, ... steps. Without a scaler it never fires.

    Args:
        action: what happens on a hit. The step itself is skipped by the scaler in any case.
        max_in_a_row: overflows in a row that are still calibration, >= 1.
        min_scale: scale below which it has collapsed, > 0.
        patience, cooldown, stop_after: see `Detector`; they count from the first hit on.

    Raises:
        ValueError: for values outside these ranges.

    References:
        P. Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, 2018 (loss scaling).

    >>> Overflow("stop", max_in_a_row=20).policy.action.value
    'stop'
    """

    name = "overflow"

    def __init__(
        self,
        action: Action | ActionName = "warn",
        *,
        max_in_a_row: int = 10,
        min_scale: float = 1.0,
        patience: int = 1,
        cooldown: int = 10,
        stop_after: int | None = None,
    ) -> None:
        super().__init__(action, patience=patience, cooldown=cooldown, stop_after=stop_after)
        require_int("max_in_a_row", max_in_a_row, at_least=1, remedy="The default is 10.")
        require_float("min_scale", min_scale, above=0.0, remedy="The default is 1.0.")
        self._max_in_a_row = max_in_a_row
        self._min_scale = min_scale
        self._in_a_row = 0

    def observe(self, measurement: Measurement) -> Verdict | None:
        """A hit if this step overflows after too many others, or at a scale that is already tiny."""
        scale = measurement.loss_scale
        if scale is None or not measurement.is_scaler_overflow:
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row <= self._max_in_a_row and scale >= self._min_scale:
            return None
        return Verdict(
            kind=self.name,
            value=scale,
            limit=self._min_scale if scale < self._min_scale else math.inf,
            message=f"gradients overflow for the {self._in_a_row}. time in a row, at a loss scale of {scale:g}",
            remedy=(
                "The gradients are NaN or infinite at any scale: look for log, sqrt, division or exp at the edge of their "
                "domain in the backward pass, or train in bf16."
            ),
            parameters=measurement.nonfinite,
            micro_batch=measurement.last_micro_batch,
            is_dire=True,
        )

    def deferral(self) -> Deferral | None:
        """For good where nothing overflows; the guard defers no step that has a scale."""
        return None if self._in_a_row else Deferral(sys.maxsize)

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """There is nothing to learn from them."""

    def state_dict(self) -> dict[str, Any]:
        """The current run of overflows."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._in_a_row = state["in_a_row"]

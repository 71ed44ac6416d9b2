"""A norm that keeps growing, slowly enough that no single step stands out."""

from __future__ import annotations

import math
from typing import Any

from lightning_gradguard.record import Measurement, Verdict
from lightning_gradguard.statistics.trend import Trend

_LONE_GROWTH = 5.0  # in multiples of `ratio`


class Growth:
    """Finds a global norm that has been rising over 64 steps; `Explosion` asks it where the norm is within its limit.

    It has to have risen `ratio` times together with the loss, or five times `ratio` times while the loss does not fall.

    Args:
        ratio: of the norm now over that of 64 steps ago; None: it never finds anything.
        kind: of the verdicts.
    """

    def __init__(self, ratio: float | None, *, kind: str) -> None:
        self._ratio = ratio
        self._kind = kind
        self._trend = Trend()
        self.is_due = False
        """Whether the next step is told of."""

    @property
    def num_left(self) -> int:
        """Steps until it looks again, >= 1."""
        return self._trend.num_left

    def harmless_norm(self, num_steps: int) -> float:
        """Up to which norm each of so many coming steps may be without its ever having grown; 0 where that isn't known."""
        if self._ratio is None:
            return math.inf
        norm = self._ratio * self._trend.lowest_start(num_steps)
        return norm if self._trend.largest_waiting <= norm else 0.0

    @property
    def loss_falls(self) -> bool:
        """Whether the last few losses lie where the loss has not been before."""
        return self._trend.loss_falls

    def observe(self, measurement: Measurement) -> Verdict | None:
        """An advisory verdict if the norm keeps growing."""
        if not self.is_due or self._ratio is None:
            return None
        self.is_due = False  # until the next block of steps is complete
        norm_before, norm = self._trend.norm_ends
        if (losses := self._trend.loss_ends) is None:
            loss = "; the loss is not known"
        else:
            loss = f", and the loss has gone from {losses[0]:.3g} to {losses[1]:.3g}"
        return Verdict(
            kind=self._kind,
            value=norm,
            limit=(1.0 if self._trend.grows(by=self._ratio) else _LONE_GROWTH) * self._ratio * norm_before,
            message=(
                f"the global gradient norm keeps growing, from {norm_before:.3g} to {norm:.3g} over the last 64 steps{loss}"
            ),
            remedy="Lower the learning rate, or end its warm-up earlier.",
            parameters=measurement.largest(),
            micro_batch=measurement.last_micro_batch,
            is_advisory=True,
        )

    def learn(self, measurement: Measurement) -> None:
        """Take a step in."""
        has_block = self._trend.add(measurement.global_norm, measurement.loss)
        self.is_due = has_block and self._ratio is not None and self._grows(self._ratio)

    def restart(self) -> None:
        """Forget what was."""
        self._trend.restart()
        self.is_due = False

    def state_dict(self) -> dict[str, Any]:
        """The trend, and whether the next step is told of."""
        return {**self._trend.state_dict(), "grows": self.is_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._trend.load_state_dict(state)
        self.is_due = state["grows"]

    def _grows(self, ratio: float) -> bool:
        trend = self._trend
        return trend.grows(by=ratio) or (trend.norm_grows(by=_LONE_GROWTH * ratio) and not trend.loss_has_fallen)

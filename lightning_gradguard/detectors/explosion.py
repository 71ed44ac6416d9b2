"""Gradients that are finite but far too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning_gradguard.detectors.base import Deferral, Detector
from lightning_gradguard.detectors.growth import Growth
from lightning_gradguard.detectors.parameter_outliers import ParameterOutliers
from lightning_gradguard.policy import Action, ActionName, require_float, require_int
from lightning_gradguard.record import Measurement, Verdict
from lightning_gradguard.statistics.baseline import LogBaseline
from lightning_gradguard.statistics.baselines import LogBaselines

_RECENT = 16
_LATEST = 5
_LOG_CEILING = math.log(4.0)  # in multiples of `ratio`
_LOG_ABOVE_HIGH = math.log(4.0)
_LOG_CLIMB = math.log(3.0)
_ROUNDING = 1e-9
_FURTHEST = 16
_ROOM = 2.0  # over the norms of late, or a healthy one would soon be above it


class Explosion(Detector):
    """Fires when the global norm exceeds an absolute limit, or when it or a single parameter leaves its history upwards.

    The relative limit is the larger of two, both counted from the median of the history: `ratio` times that median,
    and `z` robust standard deviations above it on a logarithmic scale. Both have to be exceeded, since either alone
    alarms on healthy runs: a ratio where gradients are noisy, a z-score where they hardly vary. A norm that falls never
    fires, and multiplying the loss by a constant changes no verdict.

    Where gradients are very noisy, `z` deviations can be thousands of times the median, and nothing would be found. So once
    the window is full, the limit is at most four times its second largest norm (or `ratio` times the median, if that is
    more), and at most four times `ratio` times its median: a spike of 30 times the usual norm is always found.

    Why these defaults: over 51 healthy and 36 exploding trainings the rule z > 8 with a ratio > 5 over the last 64
    norms raised no false alarm and found what any history-based rule on the global norm found; z > 6 alone raised two
    false alarms, ratio > 5 alone fifteen. A second median over the last 16 norms follows models that start to learn
    late, where a healthy norm climbs tenfold within 30 steps. While the loss falls to where it has not been before, a third
    median over the last 5 follows faster still.

    A norm that grows by a few percent at every step is followed by any median. So a norm that has risen `ratio` times over
    64 steps, without a pause and together with the loss, is a hit as well, an advisory one (see below). So is one that has
    risen five times `ratio` times, unless the loss falls.

    The same rule, with the median of the whole window alone, watches the norm of each parameter, if it carries at least
    `min_share` of the global norm. It must have left its history against the norm of all others, too: where a whole network
    starts to learn, each of its parameters rises. And it must be far above the whole window, or stay outside for three
    steps, since some parameters of healthy networks leap now and then. That sees what the global norm hides: the spike of
    one layer, and one that grows slowly, whose rise the others cover for longer than the global history takes to get used
    to it. Such a finding is advisory: it warns, and neither skips nor stops, whatever the action. So a step is skipped
    exactly where the global norm is above `limit()`, which a GPU can tell by itself without waiting for the host.

    What it can't see is a network that is sick from its first step on: there is no history to compare with, and gradients
    have no natural size. `max_norm` is for those who know their model.

    Args:
        action: what happens on a hit.
        max_norm: absolute limit for the global norm, > 0. None: no absolute limit.
        ratio: how many times the median of its history a norm may reach, > 1. None: no relative limit.
        z: robust standard deviations above the median, on the logarithm, > 0. Small values alarm on noise.
        window: steps of history, >= 2. Short ones forget a fault quickly, long ones follow slowly.
        warmup_steps: healthy steps before the relative limit counts, >= 2.
        adapt_after: hits in a row after which the new level is taken for normal and becomes the history (a change of
            data or of the loss does that), >= 2. It never happens where the action ends the training. Parameters
            learn their new level in the `warmup_steps` that follow.
        min_share: share of the global norm that a parameter must carry to be looked at alone, > 0 and <= 1. None: parameters
            are not looked at alone. At the default it outweighs all others together. It costs 264 bytes of memory for each
            parameter.
        patience, cooldown, stop_after: see `Detector`.

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
        ratio: float | None = 6.0,
        z: float = 8.0,
        window: int = 64,
        warmup_steps: int = 16,
        adapt_after: int = 20,
        min_share: float | None = 0.7,
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
        if min_share is not None:
            require_float("min_share", min_share, above=0.0, up_to=1.0, remedy="To watch the global norm alone pass None.")
        if warmup_steps > window:
            raise ValueError(f"`warmup_steps` must be <= `window`, got {warmup_steps} > {window}. Make the window longer.")
        self._max_norm = math.inf if max_norm is None else float(max_norm)
        self._ratio = ratio
        self._z = z
        self._warmup_steps = warmup_steps
        self._adapt_after = adapt_after
        self._baseline = LogBaseline(window=window, recent=_RECENT)
        self._growth = Growth(ratio, kind=self.name)
        self._limit = self._max_norm
        self._flagged: list[float] = []
        self._parameters = None
        if min_share is not None and ratio is not None:
            baselines = LogBaselines(window=window, warmup=warmup_steps, ratio=ratio, z=z)
            self._parameters = ParameterOutliers(baselines, min_share=min_share, adapt_after=adapt_after, kind=self.name)

    def limit(self) -> float:
        """The smaller of the absolute limit and, after the warm-up, the relative one."""
        return self._limit

    def observe(self, measurement: Measurement) -> Verdict | None:
        """A hit if the global norm is finite and above `limit()`, or too large for float32 arithmetic.

        An advisory one if it is not, but a parameter is above its own limit.
        """
        norm, limit = measurement.global_norm, self._limit
        if not math.isfinite(norm):
            return None
        if norm <= limit and not measurement.overflowed:
            self._flagged.clear()
            if (growth := self._growth.observe(measurement)) is not None or self._parameters is None:
                return growth
            return self._parameters.observe(measurement)
        verdict = Verdict(
            kind=self.name,
            value=norm,
            limit=limit,
            message=self._describe(norm, limit),
            remedy=(
                "Look at this batch for outliers and wrong labels. If the norm keeps growing, lower the learning rate, or "
                "warm it up for longer."
            ),
            parameters=measurement.largest(),
            micro_batch=measurement.last_micro_batch,
        )
        self._follow_shift(norm)
        return verdict

    def learn(self, measurement: Measurement) -> None:
        """Take the norms into the history."""
        self._baseline.add(measurement.global_norm)
        self._growth.learn(measurement)
        self._set_limit()
        if self._parameters is not None:
            self._parameters.learn(measurement)

    def deferral(self) -> Deferral | None:
        """Until the parameters' limits change, up to what no limit can fall below, and no growth can be found at."""
        if self._growth.is_due:
            return None
        num_steps, max_norm = _FURTHEST, min(self._max_norm, self._growth.harmless_norm(_FURTHEST))
        if len(self._baseline) and max_norm < _ROOM * math.exp(self._baseline.latest(_LATEST)):
            num_steps, max_norm = self._growth.num_left, self._max_norm
        if self._parameters is not None:
            num_steps = min(num_steps, self._parameters.num_left)
        if self._ratio is None:
            return Deferral(num_steps, max_norm)
        if (left := self._warmup_steps - len(self._baseline)) > 0:
            return Deferral(min(num_steps, left), max_norm)
        # In a short history few values can take the median anywhere.
        num_steps = min(num_steps, (len(self._baseline) - 1) // 2)
        if num_steps < 1:
            return None
        lowest = self._baseline.lowest_median(after=num_steps) + math.log(self._ratio) - _ROUNDING
        return Deferral(num_steps, min(max_norm, math.exp(min(lowest, 700.0))))

    def can_defer(self, measurement: Measurement) -> bool:
        """Whether no parameter is above its own limit."""
        return self._parameters is None or self._parameters.can_defer(measurement)

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """Take the norms into the history, and set the limit once."""
        self._flagged.clear()
        for measurement in measurements:
            self._baseline.add(measurement.global_norm)
            self._growth.learn(measurement)
        self._set_limit()
        if self._parameters is not None:
            self._parameters.catch_up(measurements)

    def state_dict(self) -> dict[str, Any]:
        """History and the current run of hits."""
        return {
            "baseline": self._baseline.state_dict(),
            "flagged": list(self._flagged),
            "trend": self._growth.state_dict(),
            "parameters": None if self._parameters is None else self._parameters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._baseline.load_state_dict(state["baseline"])
        self._flagged = list(state["flagged"])
        self._growth.load_state_dict(state["trend"])
        self._set_limit()
        if self._parameters is not None and state["parameters"] is not None:
            self._parameters.load_state_dict(state["parameters"])

    def _set_limit(self) -> None:
        self._limit = self._max_norm
        if self._ratio is None or len(self._baseline) < self._warmup_steps:
            return
        center = self._baseline.median
        if loss_falls := self._growth.loss_falls:
            center = max(center, self._baseline.latest(_LATEST))
        log_limit = center + self._baseline.distance(self._ratio, self._z)
        if self._baseline.is_full:
            log_limit = min(log_limit, self._log_ceiling(math.log(self._ratio), center, loss_falls=loss_falls))
        self._limit = min(self._max_norm, math.exp(min(log_limit, 700.0)))  # exp overflows beyond 709

    def _log_ceiling(self, log_ratio: float, center: float, *, loss_falls: bool) -> float:
        """What the limit may not exceed however noisy the history is."""
        usual = self._baseline.whole_median
        if loss_falls and center > usual + _LOG_CLIMB:
            usual = center
        return min(usual + log_ratio + _LOG_CEILING, max(center + log_ratio, self._baseline.high + _LOG_ABOVE_HIGH))

    def _follow_shift(self, norm: float) -> None:
        if self.policy.action >= Action.STOP:
            return
        self._flagged.append(norm)
        if len(self._flagged) >= self._adapt_after:
            self._baseline.restart(self._flagged)
            self._flagged.clear()
            self._growth.restart()
            self._set_limit()
            if self._parameters is not None:
                self._parameters.forget()

    def _describe(self, norm: float, limit: float) -> str:
        if norm <= limit:
            return f"the global gradient norm is {norm:.3g}, beyond what float32 arithmetic can square"
        if limit == self._max_norm:
            return f"the global gradient norm is {norm:.3g}, above max_norm={limit:g}"
        usual = math.exp(self._baseline.median)
        # The ceiling counts from the whole window's. Without it a limit is this many times the median, but for rounding.
        if self._ratio is not None and limit < (1.0 - _ROUNDING) * self._ratio * usual:
            usual = math.exp(self._baseline.whole_median)
        return f"the global gradient norm is {norm:.3g}, {norm / usual:.3g} times its usual {usual:.3g} (limit {limit:.3g})"

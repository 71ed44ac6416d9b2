"""Steps that move the weights too far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.detectors.base import Deferral, Detector
from lightning_gradguard.policy import Action, ActionName, require_float, require_int
from lightning_gradguard.record import Measurement, Verdict
from lightning_gradguard.wording import counted

_EARLY, _EARLY_EACH = 10, 1
_YOUNG, _YOUNG_EACH = 100, 10
_WATCHED = 1.0 / 3.0  # of `lasting_ratio`: above it each step is measured
_SETTLED = 0.5
# In the first steps a healthy optimizer of Adam's family may move a matrix by 0.85 of its size, and by 0.3 four times.
_EARLY_MAX = 1.5  # in multiples of `max_ratio`
_EARLY_MORE = 2


class UpdateRatio(Detector):
    """Fires when a step moves a matrix or kernel by too large a part of its own size: one step, or several in a row.

    Gradients have no natural size, updates do: a healthy step moves a weight matrix by about a thousandth of its norm. So
    this finds, without any history, what is sick from the first step on: a learning rate that is far too high, and weights
    that are overwritten. What it sees is the step before, which has been applied already; an action that skips keeps the
    one after from making it worse.

    It is off unless it is among `detectors`. Of each matrix and kernel (not of vectors) it keeps some 512 evenly spaced
    elements from one step to the next, and estimates the ratio from them. Measured are the first ten steps, of the first
    hundred one in ten at least, then one in `every_n_steps`, and each one as long as the ratio is above a third of
    `lasting_ratio`; the others cost nothing. A rate that is far too high shows at any step.

    Why these defaults: over 51 healthy and 36 exploding trainings no healthy run had an update of 0.3 three times in a row,
    or one of 1; of the exploding ones 15 and 18 had. The first steps of Adagrad and RMSprop are longer, but each is shorter
    than the one before: what has fallen to half of where it began settles, and is no finding. Among the first ten steps it
    takes 1.5 times `max_ratio`, or two steps more in a row.

    Args:
        action: what happens on a hit.
        max_ratio: update over weight that one step may not exceed, > 0.
        lasting_ratio: what `persistence` measured steps in a row may not exceed, > 0 and <= `max_ratio`.
        min_ratio: what the largest ratio of `persistence` measured steps in a row may not stay below, > 0: the weights
            hardly move. None: no lower limit, since schedules that end at a rate of zero get there in health.
        persistence: how many measured steps that takes, >= 1.
        every_n_steps: how often a step is measured after the first hundred, >= 1.
        patience, cooldown, stop_after: see `Detector`. Steps that are not measured are no hits. After an alert, 50 steps
            of silence.

    Raises:
        ValueError: for values outside these ranges.

    References:
        A. Karpathy, "A Recipe for Training Neural Networks", 2019 (updates of about a thousandth of the weights).

    >>> UpdateRatio("skip", max_ratio=0.5).policy.action.value
    'skip'
    """

    name = "update_ratio"

    def __init__(
        self,
        action: Action | ActionName = "warn",
        *,
        max_ratio: float = 1.0,
        lasting_ratio: float = 0.3,
        min_ratio: float | None = None,
        persistence: int = 3,
        every_n_steps: int = 50,
        patience: int = 1,
        cooldown: int = 50,
        stop_after: int | None = None,
    ) -> None:
        super().__init__(action, patience=patience, cooldown=cooldown, stop_after=stop_after)
        require_float("max_ratio", max_ratio, above=0.0, remedy="The default is 1.0.")
        require_float("lasting_ratio", lasting_ratio, above=0.0, up_to=max_ratio, remedy="The default is 0.3.")
        if min_ratio is not None:
            require_float("min_ratio", min_ratio, above=0.0, up_to=lasting_ratio, remedy="For no lower limit pass None.")
        require_int("persistence", persistence, at_least=1, remedy="The default is 3.")
        require_int("every_n_steps", every_n_steps, at_least=1, remedy="The default is 50.")
        self._max_ratio = max_ratio
        self._lasting_ratio = lasting_ratio
        self._min_ratio = min_ratio or 0.0
        self._persistence = persistence
        self._every_n_steps = every_n_steps
        self._num_seen = 0
        self._num_measured = 0
        self._num_high = 0
        self._first_high = 0.0
        self._num_low = 0
        self._last = 0.0

    def needs_update(self) -> bool:
        """Early, at its turn, and where the last ratio was high, or low in a row."""
        is_due = self._num_seen % self._interval == 0
        return is_due or self._last > _WATCHED * self._lasting_ratio or self._num_low > 0

    def observe(self, measurement: Measurement) -> Verdict | None:
        """A hit if the step before was measured, and moved a weight too far, or several in a row did (or hardly any)."""
        self._num_seen += 1
        ratios = measurement.update_ratios
        if ratios is None:
            return None
        known = np.where(np.isnan(ratios), 0.0, ratios)
        largest = float(known.max(initial=0.0))
        if largest == 0.0:  # a step that was not applied
            return None
        self._last = largest
        self._num_measured += 1
        self._num_high = self._num_high + 1 if largest > self._lasting_ratio else 0
        if self._num_high == 1:
            self._first_high = largest
        self._num_low = self._num_low + 1 if largest < self._min_ratio else 0
        order = np.argsort(-known, kind="stable")[:5]
        worst = measurement.names[order[0]]
        is_early = self._num_measured < _EARLY
        max_ratio = self._max_ratio * (_EARLY_MAX if is_early else 1.0)
        in_a_row = self._persistence + (_EARLY_MORE if is_early else 0)
        if largest > max_ratio:
            limit, message = max_ratio, f"the step before has moved `{worst}` by {largest:.3g} times its size"
        elif self._num_high >= in_a_row and largest >= _SETTLED * self._first_high:
            limit = self._lasting_ratio
            message = (
                f"{_in_a_row(self._num_high)} moved a weight by more than {limit:g} of its size; the last one "
                f"`{worst}` by {largest:.3g}"
            )
        elif self._num_low >= self._persistence:
            limit = self._min_ratio
            message = (
                f"{_in_a_row(self._num_low)} moved no weight by {limit:g} of its size; the last one moved `{worst}` "
                f"most, by {largest:.3g}"
            )
        else:
            return None
        remedy = "Lower the learning rate, or warm it up for longer; with Adam, raise `eps`."
        if largest < self._min_ratio:
            remedy = "Raise the learning rate, if training isn't about to end."
        return Verdict(
            kind=self.name,
            value=largest,
            limit=limit,
            message=message,
            remedy=remedy,
            parameters=tuple(
                ParameterReport(measurement.names[index], float(measurement.norms[index]))
                for index in order
                if known[index] > min(limit, largest / 2)
            ),
            micro_batch=measurement.last_micro_batch,
        )

    def deferral(self) -> Deferral | None:
        """Until just before the step after which a measurement is asked for."""
        num_steps = 0 if self.needs_update() else self._interval - self._num_seen % self._interval - 1
        return Deferral(num_steps) if num_steps > 0 else None

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """Count the steps: nothing was measured."""
        self._num_seen += len(measurements)

    @property
    def _interval(self) -> int:
        if self._num_seen < _EARLY:
            return _EARLY_EACH
        return min(self._every_n_steps, _YOUNG_EACH) if self._num_seen < _YOUNG else self._every_n_steps

    def state_dict(self) -> dict[str, Any]:
        """Counts of steps, and of findings in a row."""
        return {
            "num_seen": self._num_seen,
            "num_measured": self._num_measured,
            "num_high": self._num_high,
            "num_low": self._num_low,
            "first_high": self._first_high,
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._num_seen, self._num_high, self._num_low = state["num_seen"], state["num_high"], state["num_low"]
        # An earlier version did not count what it measured: nearly each of the first steps.
        self._num_measured = state.get("num_measured", self._num_seen)
        self._first_high, self._last = state.get("first_high", 0.0), state.get("last", 0.0)


def _in_a_row(number: int) -> str:
    return "1 measured step has" if number == 1 else f"{counted(number, 'measured step')} in a row have"

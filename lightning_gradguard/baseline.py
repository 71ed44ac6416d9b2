"""Robust running statistics. The only owner of the rule that a non-finite value never enters a baseline."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from functools import cached_property
from typing import Any

# Turns a median absolute deviation into the standard deviation of a normal distribution: 1 / Phi^-1(3/4).
MAD_TO_SIGMA = 1.4826


class LogBaseline:
    """Median and spread of the logarithms of the last values of a positive quantity.

    Gradient norms vary by factors, not by differences, so the logarithm is the natural scale: the statistics follow
    when the loss is multiplied by a constant, and median and MAD don't move for a single outlier.

    Args:
        window: how many values are kept, >= 2.
        recent: how many of the last ones the second, faster median looks at.
        min_mad: floor of the spread, in units of the natural logarithm. Without one, a phase of near-constant
            values would turn the next ordinary change into an outlier.

    References:
        F. R. Hampel, "The influence curve and its role in robust estimation", 1974 (median and MAD).

    >>> baseline = LogBaseline(window=4, recent=2)
    >>> for value in (1.0, 1.0, float("nan"), 0.0, 1.0):
    ...     baseline.add(value)
    >>> len(baseline), baseline.median
    (3, 0.0)
    """

    def __init__(self, *, window: int, recent: int, min_mad: float = 0.1) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._recent = recent
        self._min_mad = min_mad

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take in one value; what has no finite logarithm (NaN, infinities, 0, negative) is left out."""
        if 0.0 < value < math.inf:
            self._values.append(math.log(value))
            self._forget()

    def restart(self, values: Iterable[float]) -> None:
        """Start again from these values."""
        self._values.clear()
        self._forget()
        for value in values:
            self.add(value)

    @cached_property
    def median(self) -> float:
        """Median of the logarithms: the larger of the whole window's and the recent ones'.

        The recent median follows a healthy rise within a few steps; the whole window's keeps the bar up while
        the values fall. Needs at least one value.
        """
        recent = list(self._values)[-self._recent :]
        return max(_median(self._values), _median(recent))

    @cached_property
    def sigma(self) -> float:
        """Robust standard deviation of the logarithms. Needs at least one value."""
        center = _median(self._values)
        mad = _median(abs(value - center) for value in self._values)
        return MAD_TO_SIGMA * max(mad, self._min_mad)

    def state_dict(self) -> dict[str, Any]:
        """The values, as plain floats."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the last `window` values count."""
        self._values.clear()
        self._values.extend(state["values"])
        self._forget()

    def _forget(self) -> None:
        self.__dict__.pop("median", None)
        self.__dict__.pop("sigma", None)


def _median(values: Iterable[float]) -> float:
    # A tenth of the time that `statistics.median` or numpy take for a few dozen values, at every step.
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

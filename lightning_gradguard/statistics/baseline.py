"""Robust running statistics. The only owner of the rule that a non-finite value never enters a baseline."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

# Turns a median absolute deviation into the standard deviation of a normal distribution: 1 / Phi^-1(3/4).
MAD_TO_SIGMA = 1.4826


class _OrderedWindow:
    """The last values, in the order in which they came, and by size."""

    def __init__(self, window: int | None) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    @property
    def is_full(self) -> bool:
        """Whether there are as many values as the window holds."""
        return len(self._values) == self._values.maxlen

    def _take_in(self, value: float) -> None:
        if self.is_full:
            del self._ordered[bisect_left(self._ordered, self._values[0])]
        self._values.append(value)
        insort(self._ordered, value)

    def state_dict(self) -> dict[str, Any]:
        """The values, as plain floats."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the last `window` values count."""
        self._values.clear()
        self._values.extend(state["values"])
        self._ordered = sorted(self._values)


class LogBaseline(_OrderedWindow):
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
        super().__init__(window)
        self._recent = recent
        self._min_mad = min_mad

    def add(self, value: float) -> None:
        """Take in one value; what has no finite logarithm (NaN, infinities, 0, negative) is left out."""
        if not 0.0 < value < math.inf:
            return
        self._take_in(math.log(value))

    def restart(self, values: Iterable[float]) -> None:
        """Start again from these values."""
        self._values.clear()
        self._ordered.clear()
        for value in values:
            self.add(value)

    @property
    def median(self) -> float:
        """Median of the logarithms: the larger of the whole window's and the recent ones'.

        The recent median follows a healthy rise within a few steps; the whole window's keeps the limit up while
        the values fall. Needs at least one value.
        """
        return max(_middle(self._ordered), self.latest(self._recent))

    @property
    def whole_median(self) -> float:
        """Median of the logarithms of the whole window. Needs at least one value."""
        return _middle(self._ordered)

    def lowest_median(self, after: int) -> float:
        """What the median of the whole window can't fall below in the next `after` values, whatever they are.

        Needs more than twice as many values as that.
        """
        return self._ordered[(len(self._ordered) - 1) // 2 - after]

    @property
    def high(self) -> float:
        """The second largest logarithm, which a single outlier doesn't move. Needs at least two values."""
        return self._ordered[-2]

    @property
    def sigma(self) -> float:
        """Robust standard deviation of the logarithms. Needs at least one value."""
        center = _middle(self._ordered)
        mad = median(abs(value - center) for value in self._ordered)
        return MAD_TO_SIGMA * max(mad, self._min_mad)

    def latest(self, count: int) -> float:
        """Median of the logarithms of the last `count` values. Needs at least one value."""
        number = len(self._values)
        return median(islice(self._values, max(number - count, 0), number))

    def distance(self, ratio: float, z: float) -> float:
        """How far above the median a value must lie, on the logarithm: `max(log(ratio), z * sigma)`."""
        at_least = math.log(ratio)
        center, width = _middle(self._ordered), at_least / (z * MAD_TO_SIGMA)
        # Where most values lie within `width`, the spread doesn't count, and needn't be computed: the usual case.
        near = bisect_right(self._ordered, center + width) - bisect_left(self._ordered, center - width)
        if self._min_mad <= width and near > len(self._ordered) // 2:
            return at_least
        return max(at_least, z * self.sigma)


class QuantileBaseline(_OrderedWindow):
    """Percentiles of the last values of a positive quantity.

    Args:
        window: how many values are kept, >= 1; None: all.

    >>> baseline = QuantileBaseline(window=None)
    >>> for value in (3.0, 1.0, float("nan"), 0.0):
    ...     baseline.add(value)
    >>> baseline.percentile(50.0, including=2.0)
    2.0
    """

    def percentile(self, percent: float, *, including: float) -> float:
        """The value below which `percent` % of the values lie, `including` being one of them, the newest.

        Between two values it is interpolated linearly, as numpy does by default. Changes nothing.
        """
        ordered = self._ordered.copy()
        if self.is_full:
            del ordered[bisect_left(ordered, self._values[0])]
        insort(ordered, including)
        position = (len(ordered) - 1) * percent / 100.0
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    def add(self, value: float) -> None:
        """Take in one value; NaN, infinities, 0 and what is negative are left out."""
        if 0.0 < value < math.inf:
            self._take_in(value)


class ExponentialBaseline:
    """Exponential moving mean and variance of a positive quantity, begun with those of its first values.

    Args:
        decay: weight on the past, in (0, 1).
        warmup_steps: how many values begin it, >= 2; of a single one there is no variance.

    Attributes:
        mean: of the values; 0 until there are enough.
        variance: of the values, about the mean.

    >>> baseline = ExponentialBaseline(decay=0.5, warmup_steps=2)
    >>> for value in (1.0, float("nan"), 3.0):
    ...     baseline.add(value)
    >>> baseline.is_ready, baseline.mean, baseline.variance
    (True, 2.0, 1.0)
    """

    def __init__(self, *, decay: float, warmup_steps: int) -> None:
        self.mean = self.variance = 0.0
        self._decay = decay
        self._warmup_steps = warmup_steps
        self._first: list[float] = []

    @property
    def is_ready(self) -> bool:
        """Whether there have been enough values."""
        return len(self._first) >= self._warmup_steps

    def add(self, value: float) -> None:
        """Take in one value; NaN, infinities, 0 and what is negative are left out."""
        if not 0.0 < value < math.inf:
            return
        if self.is_ready:
            self.mean = self._decay * self.mean + (1.0 - self._decay) * value
            self.variance = self._decay * self.variance + (1.0 - self._decay) * (value - self.mean) ** 2
            return
        self._first.append(value)
        if len(self._first) == self._warmup_steps:
            self.mean = math.fsum(self._first) / len(self._first)
            self.variance = math.fsum((one - self.mean) ** 2 for one in self._first) / len(self._first)

    def state_dict(self) -> dict[str, Any]:
        """Mean, variance and the first values, as plain floats."""
        return {"mean": self.mean, "variance": self.variance, "first": list(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.mean, self.variance, self._first = state["mean"], state["variance"], list(state["first"])


class NamedBaselines:
    """For each of many named positive quantities the smallest of its first values, then an exponential moving mean.

    Args:
        decay: weight on the past, in (0, 1).
        warmup_steps: how many values of each name count as its first, >= 1.

    >>> baselines = NamedBaselines(decay=0.5, warmup_steps=2)
    >>> for value in (2.0, float("nan"), 0.0, 1.0, 3.0):
    ...     baselines.add(["weight"], [value])
    >>> baselines.values(["weight", "bias"])
    [2.0, None]
    """

    def __init__(self, *, decay: float, warmup_steps: int) -> None:
        self._decay = decay
        self._warmup_steps = warmup_steps
        self._counts: dict[str, int] = {}
        self._values: dict[str, float] = {}

    def values(self, names: Iterable[str]) -> list[float | None]:
        """The means, one for each name; None for what has not had its first values yet."""
        counts, known = self._counts, self._values
        return [known[name] if counts.get(name, 0) >= self._warmup_steps else None for name in names]

    def add(self, names: Iterable[str], values: Iterable[float]) -> None:
        """Take in one value for each name; NaN, infinities, 0 and what is negative are left out."""
        for name, value in zip(names, values, strict=True):
            if not 0.0 < value < math.inf:
                continue
            count = self._counts.get(name, 0)
            if count >= self._warmup_steps:
                self._values[name] = self._decay * self._values[name] + (1.0 - self._decay) * value
            else:
                self._counts[name] = count + 1
                self._values[name] = min(self._values.get(name, math.inf), value)

    def state_dict(self) -> dict[str, Any]:
        """Counts and values by name, in plain types."""
        return {"counts": dict(self._counts), "values": dict(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._counts, self._values = dict(state["counts"]), dict(state["values"])


def median(values: Iterable[float]) -> float:
    """Median of at least one value; a tenth of the time that `statistics.median` or numpy take for a few dozen."""
    return _middle(sorted(values))


def _middle(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

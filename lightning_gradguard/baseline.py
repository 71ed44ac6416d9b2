"""Robust running statistics. The only owner of the rule that a non-finite value never enters a baseline."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        self._ordered: list[float] = []
        self._recent = recent
        self._min_mad = min_mad

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Take in one value; what has no finite logarithm (NaN, infinities, 0, negative) is left out."""
        if not 0.0 < value < math.inf:
            return
        if len(self._values) == self._values.maxlen:
            del self._ordered[bisect_left(self._ordered, self._values[0])]
        log = math.log(value)
        self._values.append(log)
        insort(self._ordered, log)

    def restart(self, values: Iterable[float]) -> None:
        """Start again from these values."""
        self._values.clear()
        self._ordered.clear()
        for value in values:
            self.add(value)

    @property
    def median(self) -> float:
        """Median of the logarithms: the larger of the whole window's and the recent ones'.

        The recent median follows a healthy rise within a few steps; the whole window's keeps the bar up while
        the values fall. Needs at least one value.
        """
        return max(_middle(self._ordered), self.latest(self._recent))

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

    def state_dict(self) -> dict[str, Any]:
        """The values, as plain floats."""
        return {"values": list(self._values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the last `window` values count."""
        self._values.clear()
        self._values.extend(state["values"])
        self._ordered = sorted(self._values)


class QuantileBaseline:
    """Percentiles of the last values of a positive quantity.

    Args:
        window: how many values are kept, >= 1; None: all.

    >>> baseline = QuantileBaseline(window=None)
    >>> for value in (3.0, 1.0, float("nan"), 0.0):
    ...     baseline.add(value)
    >>> baseline.percentile(50.0, including=2.0)
    2.0
    """

    def __init__(self, window: int | None) -> None:
        self._values: deque[float] = deque(maxlen=window)
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def percentile(self, percent: float, *, including: float) -> float:
        """The value below which `percent` % of the values lie, `including` being one of them, the newest.

        Between two values it is interpolated linearly, as numpy does by default. Changes nothing.
        """
        ordered = self._ordered.copy()
        if len(self._values) == self._values.maxlen:
            del ordered[bisect_left(ordered, self._values[0])]
        insort(ordered, including)
        position = (len(ordered) - 1) * percent / 100.0
        below = math.floor(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (position - below)

    def add(self, value: float) -> None:
        """Take in one value; NaN, infinities, 0 and what is negative are left out."""
        if not 0.0 < value < math.inf:
            return
        if len(self._values) == self._values.maxlen:
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


class LogBaselines:
    """Limits for the norms of many parts of a whole, each from the median and MAD of the logarithms of its values
    in the last steps.

    A limit is what `max(log(ratio), z * sigma)` above the median allows. What exceeds it must also have risen that far
    against the rest of the whole: a part that only goes along with the others is no outlier.

    So that most steps cost a few numpy calls however many parts there are, every fourth step refreshes the limits of every
    eighth; a limit is at most 32 steps old. Memory: 4 bytes for each value of the window, and 8 more for each part.

    Args:
        window: how many steps count, >= 2.
        warmup: how many values it takes until there is a limit, >= 2.
        ratio: how many times the median is allowed in any case, > 1.
        z: robust standard deviations that are allowed, > 0.
        min_mad: floor of the spread, in units of the natural logarithm.

    References:
        F. R. Hampel, "The influence curve and its role in robust estimation", 1974 (median and MAD).

    >>> baselines = LogBaselines(window=4, warmup=2, ratio=5.0, z=8.0)
    >>> for _ in range(32):
    ...     baselines.add(np.log([3.0, 4.0]), np.log(5.0))
    >>> np.exp(baselines.limits()).round().tolist()
    [15.0, 20.0]
    >>> baselines.exceeded(np.log([3.0, 40.0]), np.log(np.hypot(3.0, 40.0))).tolist()
    [1]
    >>> baselines.exceeded(np.log([30.0, 40.0]), np.log(50.0)).tolist()
    []
    """

    def __init__(self, *, window: int, warmup: int, ratio: float, z: float, min_mad: float = 0.1) -> None:
        self._window = window
        self._warmup = warmup
        self._min_distance = math.log(ratio)
        self._z = z
        self._min_mad = min_mad
        self._values: NDArray[np.float32]
        self._totals: NDArray[np.float32]
        self._limits: NDArray[np.float64]
        self._num_added: int
        self._begin(0)

    def exceeded(self, logs: NDArray[np.float64], total: float) -> NDArray[np.int64]:
        """Indices of those that have left their history upwards, by themselves and against the rest.

        Where a limit looks exceeded, it is brought up to date first.

        Args:
            logs: logarithms of the norms of the parts.
            total: that of the norm of the whole.
        """
        if len(logs) != len(self._limits):
            return np.zeros(0, dtype=np.int64)
        found = np.flatnonzero(logs > self._limits)
        if len(found):
            self._refresh(found)
            found = found[logs[found] > self._limits[found]]
        if len(found):
            limits = self._limits_of(_against_the_rest(self._values[:, found], self._totals[:, None]).T)
            now = _against_the_rest(logs[found].astype(np.float32), np.full(1, total, dtype=np.float32))
            found = found[now > limits]
        return found

    def limits(self) -> NDArray[np.float64]:
        """Logarithms of the limits as they are; infinite where there are too few values."""
        limits: NDArray[np.float64] = self._limits.copy()
        return limits

    def median(self, index: int) -> float:
        """Median of the logarithms of one part, which needs at least one value."""
        values = self._values[:, index]
        return float(np.median(values[np.isfinite(values)]))

    def add(self, logs: NDArray[np.float64], total: float) -> None:
        """Take in one value of each; those that are not finite are left out. Another number of parts starts afresh."""
        if len(logs) != len(self._limits):
            self._begin(len(logs))
        where = self._num_added % self._window
        self._values[where] = logs
        self._totals[where] = total
        self._num_added += 1
        turn, is_between = divmod(self._num_added, _REFRESH_EVERY)
        if not is_between:
            self._refresh(slice(turn % _TURNS, None, _TURNS))

    def forget(self, indices: NDArray[np.int64]) -> None:
        """Start these again without history."""
        self._values[:, indices] = np.nan
        self._limits[indices] = np.inf

    def state_dict(self) -> dict[str, Any]:
        """Values and limits as strings of bytes: thousands of floats would be slow to save."""
        return {
            "values": _to_text(self._values),
            "totals": _to_text(self._totals),
            "limits": _to_text(self._limits),
            "window": self._window,
            "num_added": self._num_added,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; one with another window starts afresh."""
        limits = np.frombuffer(state["limits"].encode("latin-1"), dtype=np.float64).copy()
        self._begin(len(limits))
        if state["window"] == self._window:
            values = np.frombuffer(state["values"].encode("latin-1"), dtype=np.float32)
            self._values = values.reshape(self._window, len(limits)).copy()
            self._totals = np.frombuffer(state["totals"].encode("latin-1"), dtype=np.float32).copy()
            self._limits, self._num_added = limits, state["num_added"]

    def _begin(self, number: int) -> None:
        self._values = np.full((self._window, number), np.nan, dtype=np.float32)
        self._totals = np.full(self._window, np.nan, dtype=np.float32)
        self._limits = np.full(number, np.inf)
        self._num_added = 0

    def _refresh(self, indices: NDArray[np.int64] | slice) -> None:
        self._limits[indices] = self._limits_of(self._values[:, indices].T)

    def _limits_of(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """The limit of each row; infinite where there are too few values."""
        usable = np.isfinite(values)
        values = np.where(usable, values, np.float32(np.nan))
        counts = np.count_nonzero(usable, axis=1)
        limits = np.full(len(values), np.inf)
        known = counts >= self._warmup
        if known.any():
            values, counts = values[known], counts[known]
            medians = _row_medians(values, counts)
            mads = _row_medians(np.abs(values - medians[:, None]), counts)
            sigmas = MAD_TO_SIGMA * np.maximum(mads, self._min_mad)
            limits[known] = medians + np.maximum(self._min_distance, self._z * sigmas)
        return limits


_TURNS = 8
_REFRESH_EVERY = 4


# Where a part is nearly everything, what it leaves for the rest is rounding.
_MIN_REST = 1e-4


def _against_the_rest(logs: NDArray[np.float32], totals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithm of a part's norm over the norm of all others together, from those of the part and of the whole."""
    shares = np.minimum(logs - totals, 0.0)
    against: NDArray[np.float32] = shares - 0.5 * np.log(np.maximum(1.0 - np.exp(2.0 * shares), _MIN_REST))
    return against


def _to_text(values: NDArray[Any]) -> str:
    # `bytes` themselves are refused by `torch.load(weights_only=True)` where there are none.
    return values.tobytes().decode("latin-1")


def _row_medians(values: NDArray[np.float32], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Median of the `counts` values of each row that are not NaN; NaN sorts last."""
    ordered = np.sort(values, axis=1)
    rows = np.arange(len(values))
    middle: NDArray[np.float32] = (ordered[rows, (counts - 1) // 2] + ordered[rows, counts // 2]) / np.float32(2)
    return middle


def median(values: Iterable[float]) -> float:
    """Median of at least one value; a tenth of the time that `statistics.median` or numpy take for a few dozen."""
    return _middle(sorted(values))


def _middle(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

"""Which parts of a whole have left their history: robust running statistics of many quantities at once.

Like `baseline.py`, it owns the rule that a non-finite value never enters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gradguard.statistics.baseline import MAD_TO_SIGMA


class LogBaselines:
    """Limits for the norms of many parts of a whole, each from the median and MAD of the logarithms of its values
    in the last steps.

    A limit is what `max(log(ratio), z * sigma)` above the median allows. What exceeds it must also have risen that far
    against the rest of the whole: a part that only goes along with the others is no outlier.

    So that most steps cost a few numpy calls however many parts there are, limits are refreshed every 32 steps. Memory: 4
    bytes for each value of the window, and 8 more for each part.

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
        self._safe: NDArray[np.float64] | None
        self._num_added: int
        self._begin(0)

    @property
    def num_left(self) -> int:
        """Steps until limits are refreshed, >= 1."""
        return _REFRESH_EVERY - self._num_added % _REFRESH_EVERY

    def may_be_exceeded(self, norms: NDArray[np.float64]) -> bool:
        """Whether `exceeded` has to look closer: a limit, as old as it is, is exceeded, or there are other parts now."""
        if len(norms) != len(self._limits):
            return True
        if self._safe is None:
            self._safe = np.exp(np.minimum(self._limits - _ROUNDING, _MAX_LOG))
        is_above = norms > self._safe
        return bool(is_above.item(is_above.argmax()))  # half the time of `any`

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

    def highest(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Largest logarithm in the window of each, minus infinity where there is none."""
        values = self._values[:, indices].astype(np.float64)
        highest: NDArray[np.float64] = np.where(np.isfinite(values), values, -np.inf).max(axis=0)
        return highest

    def usual_shares(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logarithm of the usual share of each in the whole: the median over the window, NaN where there is none."""
        with np.errstate(invalid="ignore"):  # a step without any gradient is 0 of 0, and left out
            shares = self._values[:, indices] - self._totals[:, None]
        finite = np.isfinite(shares)
        usual = _row_medians(np.where(finite, shares, np.float32(np.nan)).T, np.count_nonzero(finite, axis=0))
        return usual.astype(np.float64)

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
        self._refresh_if_due()

    def add_each(self, logs: NDArray[np.float64], totals: NDArray[np.float64]) -> None:
        """The same for several steps, [num_steps, num_parts] and [num_steps], between two refreshes."""
        if not len(self._limits):
            self._begin(logs.shape[1])
        if len(logs) > self.num_left or logs.shape[1] != len(self._limits):
            raise ValueError("the steps must lie between two refreshes, and have as many parts as those before.")
        where = (self._num_added + np.arange(len(logs))) % self._window
        self._values[where] = logs
        self._totals[where] = totals
        self._num_added += len(logs)
        self._refresh_if_due()

    def forget(self, indices: NDArray[np.int64]) -> None:
        """Start these again without history."""
        self._values[:, indices] = np.nan
        self._limits[indices] = np.inf
        self._safe = None

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
            self._limits, self._num_added, self._safe = limits, state["num_added"], None

    def _begin(self, number: int) -> None:
        self._values = np.full((self._window, number), np.nan, dtype=np.float32)
        self._totals = np.full(self._window, np.nan, dtype=np.float32)
        self._limits = np.full(number, np.inf)
        self._safe = None
        self._num_added = 0

    def _refresh_if_due(self) -> None:
        if self._num_added % _REFRESH_EVERY == 0:
            self._refresh(slice(None))

    def _refresh(self, indices: NDArray[np.int64] | slice) -> None:
        self._limits[indices] = self._limits_of(self._values[:, indices].T)
        self._safe = None

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


_ROUNDING = 1e-9
_MAX_LOG = 709.0  # exp overflows beyond

_REFRESH_EVERY = 32


# Where a part is nearly everything, what it leaves for the rest is rounding.
_MIN_REST = 1e-4


def _against_the_rest(logs: NDArray[np.float32], totals: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithm of a part's norm over the norm of all others together, from those of the part and of the whole."""
    with np.errstate(invalid="ignore"):  # a step without any gradient is 0 of 0, NaN, and left out by the median
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

"""What gradient norms were usual before a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high

import numpy as np

from lightning_gradguard.record import Measurement

_WINDOW = 64
_BLOCK = 16
_MIN_STEPS = 8
_RANK = 3
_MIN_SHARE = 0.05
_STANDS_OUT = 3.0
_ABOVE_ALL = 1.5


@dataclass(frozen=True)
class Usual:
    """Gradient norms of the healthy steps before.

    Attributes:
        norm: a usual one: the lowest median of sixteen steps, since norms that keep growing have no usual of their own.
        largest: the third largest of all, since one or two may have been faults that nothing saw, as during a warm-up.
        num_steps: how many there were.
        outlying: parameters whose gradient in this step is three times the largest that they had.
    """

    norm: float
    largest: float
    num_steps: int
    outlying: tuple[str, ...] = ()

    def has_had(self, norm: float) -> bool:
        """Whether a healthy step had a gradient as large; False where too few are known."""
        return self.num_steps >= _MIN_STEPS and norm <= _ABOVE_ALL * self.largest

    def holds(self, norm: float) -> bool:
        """Whether a norm is one that healthy steps had too; False where too few are known."""
        return self.has_had(norm) and norm < _STANDS_OUT * self.norm and not self.outlying


class NormHistory:
    """Remembers the measurements of the last healthy steps."""

    def __init__(self) -> None:
        self._healthy: deque[Measurement] = deque(maxlen=_WINDOW)

    def note(self, measurement: Measurement) -> None:
        """A healthy step."""
        self._healthy.append(measurement)

    @property
    def norms(self) -> list[float]:
        """Global norms, oldest first."""
        return [measurement.global_norm for measurement in self._healthy]

    def usual(self, measurement: Measurement | None = None) -> Usual | None:
        """What was usual before a step; None if no healthy one is known."""
        return usual_of(self.norms, self._outlying(measurement) if measurement is not None else ())

    def _outlying(self, measurement: Measurement) -> tuple[str, ...]:
        alike = [it.norms for it in self._healthy if len(it.norms) == len(measurement.norms)]
        if len(alike) < _MIN_STEPS:
            return ()
        largest = np.sort(alike, axis=0)[-_RANK]
        found = measurement.norms > np.maximum(_STANDS_OUT * largest, _MIN_SHARE * measurement.global_norm)
        return tuple(measurement.names[index] for index in np.flatnonzero(found & (largest > 0.0)))


def usual_of(norms: Sequence[float], outlying: tuple[str, ...] = ()) -> Usual | None:
    """What is usual among norms of healthy steps, oldest first; None without any.

    >>> usual_of([1.0] * 16 + [5.0] * 16).norm
    1.0
    """
    if not norms:
        return None
    blocks = [norms[max(end - _BLOCK, 0) : end] for end in range(len(norms), 0, -_BLOCK)]
    whole = [block for block in blocks if len(block) == _BLOCK]
    lowest = min(median_high(block) for block in whole) if whole else min(norms)
    largest = sorted(norms)[-_RANK] if len(norms) >= _MIN_STEPS else max(norms)
    return Usual(lowest, largest, len(norms), outlying)

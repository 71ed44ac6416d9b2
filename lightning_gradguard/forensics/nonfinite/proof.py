"""Proves by replays which samples are to blame: without them the step is in order, with the others exchanged it is not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

_MAX_SUSPECTS = 6
"""More samples than these are not tried one by one."""


class Proof:
    """Asks replays in which samples take the places of others.

    Args:
        is_bad: whether a step is damaged in which each place has the sample that is listed for it.
        size: samples in the batch.
        max_runs: how often it may be asked.
    """

    def __init__(self, is_bad: Callable[[Sequence[int]], bool], size: int, max_runs: int) -> None:
        self._is_bad = is_bad
        self._all = range(size)
        self._runs_left = max_runs

    @property
    def is_exhausted(self) -> bool:
        """Whether it can't be asked any more."""
        return self._runs_left < 0

    def holds(self, suspects: Sequence[int]) -> bool:
        """Whether these samples, each of them, and no others are to blame; False too where it would take too many runs."""
        if not suspects or 2 * len(suspects) > len(self._all) or len(suspects) > _MAX_SUSPECTS:
            return False
        try:
            return self._is_healthy(suspects) and all(self._is_enough([row], suspects) for row in suspects)
        except _TooLong:
            return False

    def find(self) -> tuple[int, ...] | None:
        """The samples without which the step is in order; None if it is not some of them, or it takes too long. Bisects."""
        try:
            found = tuple(sorted(self._search()))
        except _TooLong:
            return None
        return found if 0 < 2 * len(found) <= len(self._all) else None

    def _is_enough(self, kept: Sequence[int], suspects: Sequence[int]) -> bool:
        """Whether the step fails with some of the suspects alone, and with the other samples exchanged."""
        others = [row for row in self._all if row not in suspects]
        turned = itertools.cycle(others[1:] + others[:1])
        return self._ask([row if row in kept else next(turned) for row in self._all])

    def _search(self) -> list[int]:
        """Find a part of the batch that is in order, then whom else it tolerates."""
        for number in (2, 4):
            width = -(-len(self._all) // number)
            for begin in range(0, len(self._all), width):
                healthy = set(self._all[begin : begin + width])
                suspects = [row for row in self._all if row not in healthy]
                if suspects and self._is_healthy(suspects):
                    return self._narrow(suspects, set())
        return []

    def _narrow(self, suspects: list[int], out: set[int]) -> list[int]:
        """Those of the suspects that are to blame; without all of them, and those that are out, the batch is in order."""
        if len(suspects) == 1:
            return suspects
        first, second = suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]
        if self._is_healthy([*out, *first]):
            return self._narrow(first, out)
        if self._is_healthy([*out, *second]):
            return self._narrow(second, out)
        return self._narrow(first, out | {*second}) + self._narrow(second, out | {*first})

    def _is_healthy(self, without: Iterable[int]) -> bool:
        """Whether the step is in order with the other samples in the places of these, which keep their own."""
        left_out = set(without)
        others = itertools.cycle([row for row in self._all if row not in left_out])
        return not self._ask([next(others) if row in left_out else row for row in self._all])

    def _ask(self, rows: Sequence[int]) -> bool:
        self._runs_left -= 1
        if self._runs_left < 0:
            raise _TooLong
        return self._is_bad(rows)


class _TooLong(Exception):  # noqa: N818 - it is none
    """The number of runs is used up."""

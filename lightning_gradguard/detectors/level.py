"""A norm that has fallen to a small part of what it was, while the loss has not fallen with it."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from lightning_gradguard.statistics.baseline import median

_BLOCK = 16
_MIN_PART = 1e-4


class _Block(NamedTuple):
    """Medians over 16 steps: of the norm, of the loss, and of how far the loss moves from step to step."""

    norm: float
    loss: float
    jitter: float


class Level:
    """Knows the highest level that the norm has had, and whether it is lost.

    A training that converges loses its gradients, too, but its loss falls. Where that has not fallen, nothing is learned any
    more: in a GAN the other network has won. A level is the median of 16 steps, so a spike makes none. It is lost once the
    norm has stayed below a ten-thousandth of it for some blocks of 16 steps in a row, with a loss that is not below the one
    of that time by more than it used to move in a step.

    Args:
        persistence: for how many steps that must last; whole blocks count.
    """

    def __init__(self, persistence: int) -> None:
        self._num_needed = -(-persistence // _BLOCK)
        self._norms: list[float] = []
        self._losses: list[float] = []
        self._highest: _Block | None = None
        self._last: _Block | None = None
        self._num_sunk = 0

    @property
    def is_lost(self) -> bool:
        """Whether the norm has sunk, and stays there."""
        return self._num_sunk >= self._num_needed

    @property
    def num_left(self) -> int:
        """Steps, >= 1, until the level may be lost; 0 while it is."""
        return max(_BLOCK * (self._num_needed - self._num_sunk) - len(self._norms), 0)

    @property
    def norm_ends(self) -> tuple[float, float]:
        """The highest level, and the last; only where it is lost."""
        assert self._highest is not None
        assert self._last is not None
        return self._highest.norm, self._last.norm

    @property
    def limit(self) -> float:
        """What the norm has stayed below; only where the level is lost."""
        return _MIN_PART * self.norm_ends[0]

    def describe(self) -> str:
        """The finding in words; only where the level is lost."""
        assert self._highest is not None
        assert self._last is not None
        return (
            f"the global gradient norm has fallen from {self._highest.norm:.3g} to {self._last.norm:.3g}, and the loss has "
            f"not fallen with it (from {self._highest.loss:.3g} to {self._last.loss:.3g})"
        )

    def add(self, norm: float, loss: float | None) -> None:
        """Take in one step; without a norm above 0 and a finite loss other than 0 it is left out."""
        if loss is None or loss == 0.0 or not math.isfinite(loss) or not 0.0 < norm < math.inf:
            return
        self._norms.append(norm)
        self._losses.append(loss)
        if len(self._norms) < _BLOCK:
            return
        moves = [abs(after - before) for before, after in itertools.pairwise(self._losses)]
        self._last = _Block(median(self._norms), median(self._losses), median(moves))
        self._norms.clear()
        self._losses.clear()
        if self._highest is None or self._last.norm > self._highest.norm:
            self._highest = self._last
        has_sunk = self._last.norm < _MIN_PART * self._highest.norm
        has_fallen = self._last.loss < self._highest.loss - self._highest.jitter
        self._num_sunk = self._num_sunk + 1 if has_sunk and not has_fallen else 0

    def state_dict(self) -> dict[str, Any]:
        """Levels, and what the next is made of, as plain floats."""
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "highest": None if self._highest is None else list(self._highest),
            "last": None if self._last is None else list(self._last),
            "num_sunk": self._num_sunk,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._norms, self._losses = list(state["norms"]), list(state["losses"])
        self._highest = None if state["highest"] is None else _Block(*state["highest"])
        self._last = None if state["last"] is None else _Block(*state["last"])
        self._num_sunk = state["num_sunk"] if self._last is not None else 0

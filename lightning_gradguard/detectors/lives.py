"""Which modules have ever had a gradient, and how often: one that has died, one that is rarely used, one that never was."""

from __future__ import annotations

import math
from itertools import compress
from typing import Any

import numpy as np

from lightning_gradguard.detectors.depth import Depth
from lightning_gradguard.layout import Bools, Ints

_MAX_UNUSED = 0.5


class Lives:
    """What `Vanishing` knows of modules whose gradient has been zero.

    A module that is looked up by one batch in twenty has its gradient of zero for twenty steps now and then. It counts as
    dead only once its rest has become as unlikely as `persistence` steps would be for a module that rests in every second
    step, from how often it had rested before.

    Args:
        persistence: steps of zero after which a module that had always had a gradient is dead.
    """

    def __init__(self, persistence: int) -> None:
        self._max_chance = 0.5**persistence
        self._has_lived: Bools | None = np.zeros(0, dtype=np.bool_)
        """Which modules with a matrix have ever had a gradient that is not zero; None: all of them."""
        self._num_zero: Ints = np.zeros(0, dtype=np.int64)
        """For how many steps each of them was zero; empty: for none."""
        self.is_noted = False
        """Whether it was told which have had none since the first step."""

    def see_even(self) -> None:
        """A step in which each module has a gradient."""
        self._has_lived = None

    def see(self, depth: Depth) -> tuple[str, ...]:
        """Any other step. Says which modules have had a gradient of zero since the first step, if they are at most half."""
        if depth.dead:
            if len(self._num_zero) != len(depth.alive):
                self._num_zero = np.zeros(len(depth.alive), dtype=np.int64)
            self._num_zero += depth.trained & ~depth.alive
        if self._has_lived is None:
            return ()
        if len(self._has_lived) != len(depth.alive):
            self._has_lived = np.zeros(len(depth.alive), dtype=np.bool_)
        self._has_lived |= depth.alive
        unused = tuple(compress(depth.names, (depth.trained & ~self._has_lived).tolist()))
        return unused if depth.dead and len(unused) <= _MAX_UNUSED * depth.trained.sum() else ()

    def may_note(self, depth: Depth) -> bool:
        """Whether a module that is trained has never had a gradient, and no note has said so."""
        return not self.is_noted and self._has_lived is not None and bool((depth.trained & ~self._has_lived).any())

    def has_no_unlived(self, trained: Bools) -> bool:
        """Whether each of these modules has had a gradient."""
        return self._has_lived is None or bool(self._has_lived[trained].all())

    def is_resting(self, module: str, num_steps: int, num_seen: int, depth: Depth) -> bool:
        """Whether so many steps of zero, the last of those that were seen, are nothing new for a module.

        One that never had a gradient does not rest.
        """
        index = depth.names.index(module)
        if self._has_lived is not None and not self._has_lived[index]:
            return False
        before = int(self._num_zero[index]) - num_steps if len(self._num_zero) == len(depth.names) else 0
        if before <= 0:
            return False
        total = num_seen - num_steps + 1
        share = (before + 1) / total
        # What is known of a few steps is not known well: two standard errors more.
        share = min(share + 2.0 * math.sqrt(share * (1.0 - share) / total), 1.0)
        return bool(share**num_steps > self._max_chance)

    def state_dict(self) -> dict[str, Any]:
        """In plain types."""
        has_lived = None if self._has_lived is None else self._has_lived.tolist()
        return {"has_lived": has_lived, "num_zero": self._num_zero.tolist(), "is_noted": self.is_noted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, also from one of a version that knew less."""
        # An earlier version told no difference: what is dead then, was reported already.
        has_lived = state.get("has_lived")
        self._has_lived = None if has_lived is None else np.array(has_lived, dtype=np.bool_)
        self._num_zero = np.array(state.get("num_zero", ()), dtype=np.int64)
        self.is_noted = state.get("is_noted", False)

"""Where norm and loss are heading: a training that falls apart slowly, and one that has just begun to learn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from lightning_gradguard.statistics.baseline import median

_BLOCK = 8
_BLOCKS = 8
_OLD = 2


class Trend:
    """Medians of norm and loss over blocks of 8 steps, the last 8 blocks of them.

    A norm that grows by the same factor at every step is followed by any running median, so no single step stands out. Its
    block medians, however, grow without a pause; so do those of a model that starts to learn late, but then the loss falls.
    The test for both is Mann and Kendall's: of the 28 pairs of blocks, how many more rise than fall. It knows ranks alone,
    so that multiplying the loss by a constant, or adding one, changes nothing.

    References:
        H. B. Mann, "Nonparametric tests against trend", 1945. M. G. Kendall, "Rank correlation methods", 1948.

    >>> trend = Trend()
    >>> for step in range(64):
    ...     _ = trend.add(1.1**step, loss=1.0 + 0.1 * step)
    >>> trend.grows(by=5.0), trend.loss_falls
    (True, False)
    """

    def __init__(self) -> None:
        self._norms: list[float] = []
        self._losses: list[float] = []
        self._norm_blocks: deque[float] = deque(maxlen=_BLOCKS)
        self._loss_blocks: deque[float] = deque(maxlen=_BLOCKS)

    @property
    def loss_falls(self) -> bool:
        """Whether the last few losses lie below all blocks but the last two."""
        old = list(self._loss_blocks)[:-_OLD]
        recent = self._losses[-_BLOCK:]
        return bool(old) and len(recent) == _BLOCK and median(recent) < min(old)

    @property
    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """First and last median of the norm, and of the loss."""
        return (self._norm_blocks[0], self._norm_blocks[-1]), (self._loss_blocks[0], self._loss_blocks[-1])

    def grows(self, by: float) -> bool:
        """Whether norm and loss have both been rising over all 64 steps, the norm by more than this factor."""
        return (
            len(self._norm_blocks) == _BLOCKS
            and self._norm_blocks[-1] > by * self._norm_blocks[0]
            and _net_rises(self._norm_blocks) >= _MIN_NORM_RISES
            and _net_rises(self._loss_blocks) >= _MIN_LOSS_RISES
        )

    def add(self, norm: float, loss: float | None) -> bool:
        """Take in one step; True if it completes a block. Without a finite loss, or a norm above 0, it is left out."""
        if loss is None or not math.isfinite(loss) or not 0.0 < norm < math.inf:
            return False
        self._norms.append(norm)
        self._losses.append(loss)
        if len(self._norms) < _BLOCK:
            return False
        self._norm_blocks.append(median(self._norms))
        self._loss_blocks.append(median(self._losses[-_BLOCK:]))
        self._norms.clear()
        del self._losses[:-_BLOCK]
        return True

    def restart(self) -> None:
        """Forget what was."""
        for values in (self._norms, self._losses, self._norm_blocks, self._loss_blocks):
            values.clear()

    def state_dict(self) -> dict[str, Any]:
        """Blocks, and what the next is made of, as plain floats."""
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "norm_blocks": list(self._norm_blocks),
            "loss_blocks": list(self._loss_blocks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._norms, self._losses = list(state["norms"]), list(state["losses"])
        self._norm_blocks = deque(state["norm_blocks"], maxlen=_BLOCKS)
        self._loss_blocks = deque(state["loss_blocks"], maxlen=_BLOCKS)


# Of 28 pairs. In 90 healthy runs, a norm that rose fivefold came with a loss at -18 and below; in sick ones at 14 and above.
_MIN_NORM_RISES = 20
_MIN_LOSS_RISES = 14


def _net_rises(values: Sequence[float]) -> int:
    ordered = list(values)
    pairs = ((before, after) for at, after in enumerate(ordered) for before in ordered[:at])
    return sum((after > before) - (after < before) for before, after in pairs)

"""What is measured for the logs alone, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_gradguard.policy import is_due, next_due

HistogramsOf = Literal["raw", "clipped"]
"""Whether histograms are of the gradients as backward has left them, or as the optimizer gets them."""
HISTOGRAMS_OF: tuple[str, ...] = get_args(HistogramsOf)

OTHER_NORM_TYPES = (1.0, math.inf)
"""Norms beside the 2-norm. Powers of others leave the range of float32: 1e-12 to the fourth is 0 there."""


@dataclass(frozen=True)
class Logged:
    """What is measured for the logs alone; by default nothing.

    Attributes:
        interval: every how many steps scalars are due, >= 0; 0: never.
        has_readers: whether somebody on this rank takes them away; what takes no agreement is else not measured.
        norm_types: what other norms than 2 are measured at those steps, on all ranks.
        histogram_interval: every how many steps histograms are due, >= 0; 0: never.
        histograms_of: of which gradients they are.
    """

    interval: int = 0
    has_readers: bool = False
    norm_types: tuple[float, ...] = ()
    histogram_interval: int = 0
    histograms_of: HistogramsOf = "raw"

    def weights_are_due(self, step: int) -> bool:
        """Whether learning rate, weights and their update are measured."""
        return self.has_readers and is_due(step, self.interval)

    def next_due(self, step: int) -> int:
        """The first step after one at which something is due."""
        return min(next_due(step, self.interval), next_due(step, self.histogram_interval))

    def norms_due(self, step: int) -> tuple[float, ...]:
        """What other norms are measured."""
        return self.norm_types if self.norm_types and is_due(step, self.interval) else ()

    def histogram_is_due(self, step: int) -> bool:
        """Whether elements are counted."""
        return is_due(step, self.histogram_interval)


def other_norm_types(wanted: Sequence[float]) -> tuple[float, ...]:
    """Those of the norm types that a user wants beside the 2-norm, which is measured in any case.

    Raises:
        ValueError: for a type that can't be measured.

    >>> other_norm_types([2.0, math.inf])
    (inf,)
    """
    known = (*OTHER_NORM_TYPES, 2.0)
    if not isinstance(wanted, (list, tuple)) or any(isinstance(each, bool) or each not in known for each in wanted):
        raise ValueError(
            "`log_norm_types` must be a list of 1.0 (sum of the magnitudes) and math.inf (the largest magnitude), got "
            f"{wanted!r}. The 2-norm is logged in any case."
        )
    return tuple(float(each) for each in dict.fromkeys(wanted) if each != 2.0)

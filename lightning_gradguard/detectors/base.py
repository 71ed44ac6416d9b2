"""What a detector is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from lightning_gradguard.policy import Action, ActionName, Policy, to_action
from lightning_gradguard.record import Measurement, Verdict


class Deferral(NamedTuple):
    """How far a detector can wait with its judgement.

    Attributes:
        num_steps: how many of the coming steps may be judged later; with less than 1 the next is judged at once.
        max_norm: up to which global norm they may.
    """

    num_steps: int
    max_norm: float = math.inf


class Detector(ABC):
    """Judges one step after another.

    A detector of your own needs a `name` and `observe`; the rest has defaults that mean "no limit, no memory".

    Args:
        action: what happens on a hit.
        patience: consecutive hits before acting, >= 1. Until then it warns, or is silent where `action` is no stronger.
        cooldown: steps without a hit after which the next hit is news, >= 0. Until then all are one condition, reported when
            it begins, when its action gets stronger, and when it is over. 0: every hit is reported.
        stop_after: training stops at that many hits in a row, whatever the action; None: never.

    Raises:
        ValueError: for values outside these ranges.

    >>> class LargeBias(Detector):
    ...     name = "large_bias"
    ...     def observe(self, measurement):
    ...         norm = measurement.by_name.get("head.bias", 0.0)
    ...         if norm > 3.0:
    ...             return Verdict(self.name, norm, 3.0, "the head's bias has a large gradient", "center the targets")
    >>> LargeBias("skip", patience=2).policy.act(hits=2).value
    'skip'
    """

    name: ClassVar[str] = ""
    """Kind of its alerts; unique among the detectors of a guard."""

    is_gated: ClassVar[bool] = False
    """Whether it fires exactly when the global norm is finite and above `limit()`, advisory verdicts apart. A GPU can then
    skip without asking."""

    def __init__(
        self,
        action: Action | ActionName = "warn",
        *,
        patience: int = 1,
        cooldown: int = 50,
        stop_after: int | None = None,
    ) -> None:
        self.policy = Policy(to_action(action, parameter="action"), patience, cooldown, stop_after)

    def limit(self) -> float:
        """The global norm (> 0) that the next step may not exceed; infinite for none."""
        return math.inf

    @abstractmethod
    def observe(self, measurement: Measurement) -> Verdict | None:
        """Judge a step; None if there is nothing to say. Called once for every step, in order."""

    def learn(self, measurement: Measurement) -> None:
        """Take a step into the baseline.

        Called after `observe`, and only for steps that were finite, applied, and not flagged by this detector.
        """

    def needs_update(self) -> bool:
        """Whether the next measurement shall have `update_ratios`: how far the coming step moves the weights.

        Asked once a step, after it was judged, and alike on all ranks. It costs a copy of the matrices until then.
        """
        return False

    def deferral(self) -> Deferral | None:
        """For how many of the coming steps it is known, without a look at them, that there will be nothing to say.

        The guard looks at their global norm alone, at `can_defer`, and whether they are finite; once one doesn't keep to
        that, or the number is reached, it calls `catch_up` with those that have been, and goes on as usual. So what is found
        does not depend on it, and a healthy step costs next to nothing. None: each step is judged at once.
        """
        return None

    def can_defer(self, measurement: Measurement) -> bool:  # noqa: ARG002
        """Whether one of these steps may be judged later, so far as the global norm doesn't tell."""
        return True

    def catch_up(self, measurements: Sequence[Measurement]) -> None:
        """Do what `observe` and `learn` do for steps that were deferred, oldest first: finite, applied, nothing found."""
        for measurement in measurements:
            self.observe(measurement)
            self.learn(measurement)

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a checkpoint, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""

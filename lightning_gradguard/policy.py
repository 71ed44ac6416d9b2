"""What to do about a verdict: the actions, and how a detector escalates to them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import Literal

ActionName = Literal["log", "warn", "skip", "rollback", "stop", "raise"]


class Action(str, Enum):
    """What happens when a detector fires, from mildest to strongest.

    Members compare by severity, so `max(actions)` is the strongest. `STOP` and `RAISE` skip the bad
    step as well: it is never applied.

    >>> Action("warn") < Action.SKIP < Action.STOP
    True
    >>> max(Action.LOG, Action.RAISE, Action.WARN).value
    'raise'
    """

    LOG = "log"
    WARN = "warn"
    SKIP = "skip"
    ROLLBACK = "rollback"
    STOP = "stop"
    RAISE = "raise"

    @property
    def severity(self) -> int:
        """Position from mildest (0) to strongest (5)."""
        return _SEVERITY[self]

    @property
    def skips(self) -> bool:
        """Whether the optimizer step is passed over."""
        return self.severity >= Action.SKIP.severity

    # str already orders its values alphabetically, so all four have to be replaced.
    def __lt__(self, other: str) -> bool:
        return self.severity < Action(other).severity

    def __le__(self, other: str) -> bool:
        return self.severity <= Action(other).severity

    def __gt__(self, other: str) -> bool:
        return self.severity > Action(other).severity

    def __ge__(self, other: str) -> bool:
        return self.severity >= Action(other).severity

    def __str__(self) -> str:
        return self.value


_SEVERITY = {action: severity for severity, action in enumerate(Action)}


def to_action(value: Action | str, *, parameter: str) -> Action:
    """Read an action's name.

    Args:
        value: an `Action` or its name.
        parameter: how the user calls it, for the error message.

    Raises:
        ValueError: for an unknown name.
    """
    try:
        return Action(value)
    except ValueError:
        names = ", ".join(repr(str(action)) for action in Action)
        raise ValueError(
            f"`{parameter}` must be one of {names}, got {value!r}. To turn a built-in detector off pass None."
        ) from None


@dataclass(frozen=True)
class Policy:
    """How one detector's hits turn into actions.

    Args:
        action: what happens once `patience` is exhausted.
        patience: consecutive hits before `action` is taken, >= 1. Until then the guard warns; where `action` is "warn" or
            "log" it says nothing. 1 acts at once.
        cooldown: steps without a hit after which the next one counts as something new, >= 0. Hits up to then belong to one
            condition: it is reported when it begins, when its action gets stronger, and when it is over. They are still
            acted on, and counted. 0 reports every hit.
        stop_after: hits in a row at which training stops, whatever `action` is, >= 1. None: never.

    Raises:
        ValueError: for values outside these ranges.
    """

    action: Action
    patience: int = 1
    cooldown: int = 0
    stop_after: int | None = None

    def __post_init__(self) -> None:
        require_int("patience", self.patience, at_least=1, remedy="Pass 1 to act on the first hit.")
        require_int("cooldown", self.cooldown, at_least=0, remedy="Pass 0 to report every hit.")
        if self.stop_after is not None:
            require_int("stop_after", self.stop_after, at_least=1, remedy="Pass None never to stop for repeated hits.")

    def act(self, hits: int) -> Action:
        """The action after `hits` hits in a row (>= 1)."""
        action = self.action if hits >= self.patience else min(self.action, Action.WARN)
        if self.stop_after is not None and hits >= self.stop_after:
            action = max(action, Action.STOP)
        return action


def require_int(parameter: str, value: object, *, at_least: int, remedy: str) -> None:
    """Raise a `ValueError` that names the parameter, its constraint, the value and the remedy."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"`{parameter}` must be an integer >= {at_least}, got {value!r}. {remedy}")


def require_float(
    parameter: str, value: object, *, above: float, remedy: str, up_to: float = float("inf"), infinite: bool = False
) -> None:
    """Raise a `ValueError` unless `above < value <= up_to`; NaN never passes, infinity only where `infinite`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and above < value <= up_to and (infinite or value != float("inf")):  # type: ignore[operator]
        return
    upper = f" and <= {up_to:g}" if up_to != float("inf") else "" if infinite else " and finite"
    raise ValueError(f"`{parameter}` must be a number > {above:g}{upper}, got {value!r}. {remedy}")


def require_decay(value: object, *, default: float) -> None:
    """Raise a `ValueError` unless `decay`, the weight on the past, lies in (0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ValueError(f"`decay` must be a number > 0 and < 1, got {value!r}. The authors' choice is {default}.")


def next_due(step: int, interval: int) -> int:
    """The first step after one at which it happens; beyond all steps at an interval of 0.

    >>> next_due(0, 50), next_due(48, 50), next_due(49, 50)
    (49, 49, 99)
    """
    return (step + 1) // interval * interval + interval - 1 if interval > 0 else sys.maxsize


def is_due(step: int, interval: int) -> bool:
    """Whether something that happens every so many steps, counted from 0, happens at this one; never at an interval of 0."""
    return interval > 0 and (step + 1) % interval == 0

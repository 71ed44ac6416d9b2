"""Everything this package raises or warns with.

RuntimeError
  GradientError        the action "raise" was taken; carries the alert
ValueError
  (plain)              a bad argument: the message names parameter, constraint, value and remedy
  ConflictError        settings of Trainer and guard that exclude each other; defined in `trainer/conflicts.py`, since
                       it is Lightning's MisconfigurationException as well
UserWarning
  GradientWarning      an alert
  SinkWarning          a sink failed; training goes on without it
  GuardWarning         anything else worth a look: a state that doesn't fit, a stop that is deferred
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_gradguard.alert import Alert


class GradientError(RuntimeError):
    """Raised by the action `"raise"`, on all ranks together, before the bad step is applied.

    Attributes:
        alert: what was found.
    """

    def __init__(self, alert: Alert) -> None:
        super().__init__(alert.message)
        self.alert = alert

    def __reduce__(self) -> tuple[type[GradientError], tuple[Alert]]:
        return type(self), (self.alert,)


def type_and_text(error: BaseException) -> str:
    """Type and text of an exception of anybody's, of which not even the text can be relied on.

    >>> type_and_text(OSError("disk full"))
    'OSError: disk full'
    """
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - it is the user's code
        text = "it has no text"
    return f"{type(error).__name__}: {text}"


class GradientWarning(UserWarning):
    """An alert about gradients."""


class SinkWarning(UserWarning):
    """A sink failed and is switched off; training goes on."""


class GuardWarning(UserWarning):
    """Something about the guard itself that a user should know."""


def words_of(error: BaseException) -> str:
    """What an exception says; nothing where saying it fails."""
    with suppress(Exception):
        return str(error)
    return ""

"""An exception that was raised because of NaN or infinity, in words and as an alert."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace

from lightning_gradguard.alert import Alert, Culprit
from lightning_gradguard.errors import words_of
from lightning_gradguard.policy import Action
from lightning_gradguard.record import Decision, Position, Verdict
from lightning_gradguard.report.alerting import alerts_of

_MAX_QUOTED = 200
_REMEDY = (
    "Look at this batch for NaN, Inf or empty samples, and at the forward pass for log, sqrt, division or exp at the edge "
    "of their domain."
)
CANT_REPLAY = (
    "GradGuard can't tell whether NaN or Inf is the reason: after this error the process can't use its GPU any more, so "
    "that the step can't be replayed. `CUDA_LAUNCH_BLOCKING=1` shows the line; an index made from NaN often ends so."
)
"""What is noted of an error of a GPU."""


@dataclass(frozen=True)
class Raised:
    """An exception that was raised because of NaN or infinity.

    Attributes:
        message: what was raised, in words.
        micro_batch: the one that raised, from 0 in its step.
        culprit: who made the damage; None if that is not known.
    """

    message: str
    micro_batch: int = 0
    culprit: Culprit | None = None

    def told_by(self, verdict: Verdict) -> Verdict:
        """A finding of NaN or infinity, with the exception in the place of what was measured."""
        return replace(verdict, message=self.message, micro_batch=self.micro_batch, parameters=())


def in_words(error: BaseException, *, seen: str = "") -> str:
    """What was raised, quoted by its first line.

    Args:
        error: what was raised.
        seen: what NaN or infinity was seen in, where it is not known that this is the reason.
    """
    lines = words_of(error).strip().splitlines()
    quoted = lines[0].rstrip(":. ") if lines else ""
    if len(quoted) > _MAX_QUOTED:
        quoted = quoted[:_MAX_QUOTED].rstrip() + "..."
    words = f': "{quoted}"' if quoted else ""
    if seen:
        return f"`{type(error).__name__}`{words} was raised, and {seen}"
    return f"NaN or Inf is the reason of `{type(error).__name__}`{words}"


def alert_of(position: Position, raised: Raised, action: Action) -> Alert:
    """The alert about an exception that passes on.

    Args:
        position: where in the training.
        raised: the exception.
        action: of the detector; it does no more than warn, since there is no step to act on.
    """
    action = min(action, Action.WARN)
    verdict = raised.told_by(Verdict("nonfinite", math.nan, math.inf, "", _REMEDY))
    decision = Decision(action, (action,), (True,), skip=False)
    (alert,) = alerts_of(position, (verdict,), decision, raised.culprit, done="The exception passes on.")
    return alert


def add_note(error: BaseException, note: str) -> None:
    """Have a sentence shown below an exception's traceback, from Python 3.11 on."""
    add = getattr(error, "add_note", None)
    if add is not None:  # pragma: no branch - Python 3.10 has no notes
        with suppress(Exception):  # a class may have one of its own
            add(note)

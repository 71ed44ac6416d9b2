"""From verdicts to an action: patience, cooldown, and the number of hits after which training stops. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_gradguard.policy import Action, Policy
from lightning_gradguard.record import Decision, Ended, Verdict

_FIRST_REMINDER = 25
"""Steps after which a dire condition is reported again; from then on whenever it has lasted twice as long."""
_MIN_LASTED = 5
"""Steps, from the first hit to the last, from which on the end of a condition is worth a line."""
_NUM_APART = 3
"""Conditions in a row that are told one by one; from then on what comes and goes is soon one condition."""
_QUIET = 100
"""Steps without a hit after which conditions no longer count as recurring."""


@dataclass(frozen=True)
class Streak:
    """What one detector has done lately.

    Its hits make a condition as long as none is more than the cooldown after the one before. Where conditions recur, the
    cooldown is ten times as long for each from the fourth on, so that what comes and goes isn't reported hundreds of times.

    Attributes:
        hits: in a row, up to the last step.
        began_at: step at which the condition began that may still last; None: there is none.
        last_at: step of its last hit.
        num_found: its hits.
        num_recent: conditions that began without a longer pause between them, this one included.
        alerted_at: step of its last alert; None: it has not been reported.
        alerted_action: the action of its last alert.
    """

    hits: int = 0
    began_at: int | None = None
    last_at: int = 0
    num_found: int = 0
    num_recent: int = 0
    alerted_at: int | None = None
    alerted_action: Action | None = None

    @property
    def is_idle(self) -> bool:
        """Whether there is no condition that may last, so that steps without a hit change nothing."""
        return self.began_at is None

    def miss(self, step: int, policy: Policy, kind: str = "") -> tuple[Streak, Ended | None]:
        """After a step without a hit: the new streak, and the condition that has come to its end, if it is worth a line."""
        if self.began_at is None:
            return self, None
        if step + 1 - self.last_at <= self._cooldown(policy):
            return (replace(self, hits=0) if self.hits else self), None
        after = Streak(last_at=self.last_at, num_recent=self.num_recent)
        lasted = self.last_at - self.began_at + 1
        if self.alerted_at is None or lasted < _MIN_LASTED:
            return after, None
        return after, Ended(kind, lasted, self.num_found, steps_ago=step - self.last_at)

    def hit(self, step: int, policy: Policy, verdict: Verdict) -> tuple[Streak, Action, bool]:
        """After a hit: the new streak, the action, and whether it is reported.

        A condition is reported when it begins, when its action gets stronger, and whenever it ends the training: nobody
        should have to guess why it did. One that would only be warned of begins to count once `patience` is exhausted. An
        advisory hit never does more than warn; a note is only logged, and no hit.
        """
        if verdict.is_note:
            return self, Action.LOG, True
        hits = self.hits + 1
        action = policy.act(hits)
        if verdict.is_advisory:
            action = min(action, Action.WARN)
        condition = replace(self._at(step, policy), hits=hits, last_at=step)
        is_held_back = policy.action <= Action.WARN and hits < policy.patience
        is_news = not is_held_back and (
            condition.alerted_action is None
            or action > condition.alerted_action
            or (verdict.is_dire and condition._reminder_is_due(step))
        )
        if action < Action.STOP and not is_news:
            return condition, action, False
        return replace(condition, alerted_at=step, alerted_action=action), action, True

    def _cooldown(self, policy: Policy) -> int:
        widened: int = policy.cooldown * 10 ** max(self.num_recent - _NUM_APART, 0)
        return widened

    def _at(self, step: int, policy: Policy) -> Streak:
        """The condition that a hit at this step belongs to, with one hit more."""
        if self.began_at is not None and step - self.last_at <= self._cooldown(policy):
            return replace(self, num_found=self.num_found + 1)
        num_recent = self.num_recent if step - self.last_at <= max(_QUIET, policy.cooldown) else 0
        return Streak(began_at=step, num_found=1, num_recent=num_recent + 1)

    def _reminder_is_due(self, step: int) -> bool:
        if self.alerted_at is None or self.began_at is None:
            return False
        return step - self.began_at >= max(2 * (self.alerted_at - self.began_at), _FIRST_REMINDER)

    def state_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {**vars(self), "alerted_action": None if self.alerted_action is None else self.alerted_action.value}

    @classmethod
    def from_state(cls, state: dict[str, Any] | Sequence[Any]) -> Streak:
        """From a saved state; earlier versions kept hits, step and action of the last alert, and no condition."""
        if not isinstance(state, dict):
            hits, alerted_at, action = state
            if alerted_at is None:
                return cls(hits)
            state = {"began_at": alerted_at, "last_at": alerted_at, "alerted_at": alerted_at, "alerted_action": action}
            state |= {"hits": hits, "num_found": 1, "num_recent": 1}
        action = state["alerted_action"]
        return cls(**{**state, "alerted_action": None if action is None else Action(action)})


def decide(
    step: int,
    policies: Sequence[Policy],
    streaks: Sequence[Streak],
    verdicts: Sequence[Verdict | None],
    *,
    kinds: Sequence[str],
    must_skip: bool = False,
) -> tuple[Decision, tuple[Streak, ...]]:
    """Decide about one step; the strongest action wins.

    Args:
        step: number of the step among those of this optimizer.
        policies: one per detector.
        streaks: one per detector, as the last step left them.
        verdicts: one per detector; None where it found nothing.
        kinds: names of the detectors.
        must_skip: the step can't be applied whatever the detectors say.

    Returns:
        The decision, with `actions` and `alerting` for each verdict that is not None, and the new streaks.
    """
    after: list[Streak] = []
    actions: list[Action] = []
    alerting: list[bool] = []
    ended: list[Ended] = []
    for policy, streak, verdict, kind in zip(policies, streaks, verdicts, kinds, strict=True):
        if verdict is None:
            new, end = streak.miss(step, policy, kind)
            if end is not None:
                ended.append(end)
        else:
            new, action, is_reported = streak.hit(step, policy, verdict)
            actions.append(action)
            alerting.append(is_reported)
        after.append(new)
    if not actions:
        return Decision(skip=must_skip, ended=tuple(ended)), tuple(after)
    strongest = max(actions)
    skip = must_skip or strongest.skips
    return Decision(strongest, tuple(actions), tuple(alerting), skip=skip, ended=tuple(ended)), tuple(after)

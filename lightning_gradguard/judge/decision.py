"""From verdicts to an action: patience, cooldown, and the number of hits after which training stops. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradguard.policy import Action, Policy
from lightning_gradguard.record import Decision, Verdict


@dataclass(frozen=True)
class Streak:
    """What one detector has done lately.

    Attributes:
        hits: in a row, up to the last step.
        alerted_at: step of its last alert.
        alerted_action: the action of its last alert.
    """

    hits: int = 0
    alerted_at: int | None = None
    alerted_action: Action | None = None

    def miss(self) -> Streak:
        """After a step without a hit."""
        return Streak(0, self.alerted_at, self.alerted_action) if self.hits else self

    def hit(self, step: int, policy: Policy, *, is_advisory: bool = False) -> tuple[Streak, Action, bool]:
        """After a hit: the new streak, the action, and whether it is reported.

        Inside the cooldown it is not, unless the action is stronger than the last that was reported, or ends the
        training: nobody should have to guess why it did. An advisory hit never does more than warn.
        """
        hits = self.hits + 1
        action = min(policy.act(hits), Action.WARN) if is_advisory else policy.act(hits)
        silent = self.alerted_at is not None and step - self.alerted_at <= policy.cooldown
        stronger = self.alerted_action is not None and action > self.alerted_action
        if silent and not stronger and action < Action.STOP:
            return Streak(hits, self.alerted_at, self.alerted_action), action, False
        return Streak(hits, step, action), action, True


def decide(
    step: int,
    policies: Sequence[Policy],
    streaks: Sequence[Streak],
    verdicts: Sequence[Verdict | None],
    *,
    must_skip: bool = False,
) -> tuple[Decision, tuple[Streak, ...]]:
    """Decide about one step; the strongest action wins.

    Args:
        step: number of the step among those of this optimizer.
        policies: one per detector.
        streaks: one per detector, as the last step left them.
        verdicts: one per detector; None where it found nothing.
        must_skip: the step can't be applied whatever the detectors say.

    Returns:
        The decision, whose tuples have one entry for each verdict that is not None, and the new streaks.
    """
    outcomes = [
        None if verdict is None else streak.hit(step, policy, is_advisory=verdict.is_advisory)
        for policy, streak, verdict in zip(policies, streaks, verdicts, strict=True)
    ]
    after = tuple(
        streak.miss() if outcome is None else outcome[0] for streak, outcome in zip(streaks, outcomes, strict=True)
    )
    found = [outcome for outcome in outcomes if outcome is not None]
    if not found:
        return Decision(skip=must_skip), after
    actions = tuple(action for _, action, _ in found)
    strongest = max(actions)
    alerting = tuple(alerting for _, _, alerting in found)
    return Decision(strongest, actions, alerting, skip=must_skip or strongest.skips), after

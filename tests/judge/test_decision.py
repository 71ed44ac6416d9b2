"""Verdicts to an action: patience, cooldown, escalation, the strongest wins."""

from __future__ import annotations

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Action, Verdict
from lightning_gradguard.judge.decision import Streak, decide
from lightning_gradguard.policy import Policy

HIT = Verdict("own", 2.0, 1.0, "too much", "less")


def play(policy, hits):
    """The decisions about a sequence of hits and misses."""
    streaks, decisions = (Streak(),), []
    for step, hit in enumerate(hits):
        decision, streaks = decide(step, [policy], streaks, [HIT if hit else None])
        decisions.append(decision)
    return decisions


def actions(policy, hits):
    """The action of each step, by name."""
    return [decision.action and decision.action.value for decision in play(policy, hits)]


def reported(policy, hits):
    """Whether each step is reported."""
    return [any(decision.alerting) for decision in play(policy, hits)]


def test_decide_no_verdict_does_nothing():
    """A healthy step has no action and is not skipped."""
    (decision,) = play(Policy(Action.RAISE), [False])
    assert decision.action is None
    assert not decision.skip
    assert decision.actions == decision.alerting == ()


def test_decide_no_detector_does_nothing():
    """A guard with everything switched off decides too."""
    decision, streaks = decide(0, [], (), [])
    assert decision.action is None
    assert streaks == ()


def test_decide_patience_warns_until_it_is_exhausted():
    """The third hit in a row is acted on."""
    assert actions(Policy(Action.SKIP, patience=3), [1, 1, 1, 1]) == ["warn", "warn", "skip", "skip"]


def test_decide_patience_starts_again_after_a_miss():
    """Consecutive means consecutive."""
    assert actions(Policy(Action.SKIP, patience=2), [1, 0, 1, 1]) == ["warn", None, "warn", "skip"]


def test_decide_stop_after_counts_hits_in_a_row():
    """A miss in between starts the count again."""
    policy = Policy(Action.SKIP, stop_after=3)
    assert actions(policy, [1, 1, 0, 1, 1, 1]) == ["skip", "skip", None, "skip", "skip", "stop"]


def test_decide_cooldown_keeps_silent_but_acts():
    """Two steps of silence after an alert; the steps are skipped all the same."""
    policy = Policy(Action.SKIP, cooldown=2)
    assert reported(policy, [1, 1, 1, 1, 1]) == [True, False, False, True, False]
    assert actions(policy, [1, 1, 1]) == ["skip"] * 3


def test_decide_cooldown_counts_steps_not_hits():
    """Healthy steps use it up too."""
    assert reported(Policy(Action.WARN, cooldown=2), [1, 0, 0, 1]) == [True, False, False, True]


def test_decide_cooldown_zero_reports_every_hit():
    """The default of NonFinite: each costs a step."""
    assert all(reported(Policy(Action.WARN), [1] * 4))


def test_decide_stronger_action_in_cooldown_is_reported():
    """The step from warning to skipping is not hidden."""
    assert reported(Policy(Action.SKIP, patience=3, cooldown=10), [1, 1, 1, 1]) == [True, False, True, False]


@pytest.mark.parametrize("action", [Action.STOP, Action.RAISE])
def test_decide_end_of_training_in_cooldown_is_reported_each_time(action):
    """Nobody has to guess why a training ends."""
    assert reported(Policy(action, cooldown=10), [1, 1, 1]) == [True] * 3


def test_decide_several_detectors_takes_the_strongest():
    """Each verdict keeps its own action beside it."""
    policies = [Policy(Action.WARN), Policy(Action.STOP), Policy(Action.SKIP), Policy(Action.RAISE)]
    decision, _ = decide(0, policies, (Streak(),) * 4, [HIT, HIT, HIT, None])
    assert decision.action is Action.STOP
    assert decision.actions == (Action.WARN, Action.STOP, Action.SKIP)
    assert decision.skip


def test_decide_several_detectors_counts_each_apart():
    """One detector's hits don't use up another's patience."""
    policies = [Policy(Action.SKIP, patience=2), Policy(Action.SKIP, patience=2)]
    _, streaks = decide(0, policies, (Streak(), Streak()), [HIT, None])
    decision, _ = decide(1, policies, streaks, [None, HIT])
    assert decision.action is Action.WARN


@examples
@given(
    st.lists(st.booleans(), max_size=30),
    st.integers(1, 4),
    st.integers(0, 5),
    st.none() | st.integers(1, 5),
)
def test_decide_same_input_gives_the_same_output(hits, patience, cooldown, stop_after):
    """Pure: nothing but the arguments counts, and they are left as they are."""
    policy = Policy(Action.SKIP, patience, cooldown, stop_after)
    assert play(policy, hits) == play(policy, hits)
    streaks = (Streak(2, 0, Action.WARN),)
    decide(5, [policy], streaks, [HIT])
    assert streaks == (Streak(2, 0, Action.WARN),)


@examples
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 5))
def test_decide_first_hit_of_all_is_reported(hits, cooldown):
    """Silence only ever follows an alert, and lasts `cooldown` steps at most."""
    told = reported(Policy(Action.WARN, cooldown=cooldown), hits)
    last = None
    for step, hit in enumerate(hits):
        assert told[step] == (hit and (last is None or step - last > cooldown))
        last = step if told[step] else last

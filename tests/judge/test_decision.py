"""Verdicts to an action: patience, cooldown, escalation, the strongest wins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Action, Verdict
from lightning_gradguard.judge.decision import Streak, decide
from lightning_gradguard.policy import Policy
from lightning_gradguard.record import Ended

HIT = Verdict("own", 2.0, 1.0, "too much", "less")


def play(policy, hits, verdict=HIT):
    """The decisions about a sequence of hits and misses."""
    streaks, decisions = (Streak(),), []
    for step, hit in enumerate(hits):
        decision, streaks = decide(step, [policy], streaks, [verdict if hit else None], kinds=["own"])
        decisions.append(decision)
    return decisions


def lines(policy, hits, verdict=HIT):
    """What is reported: (step, action) of a finding, (step, steps it lasted) of an end."""
    told = []
    for step, decision in enumerate(play(policy, hits, verdict)):
        told += [
            (step, action.value) for action, alerting in zip(decision.actions, decision.alerting, strict=True) if alerting
        ]
        told += [(step, ended.lasted) for ended in decision.ended]
    return told


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
    decision, streaks = decide(0, [], (), [], kinds=[])
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


def test_decide_condition_that_lasts_is_reported_once_but_acted_on():
    """However much longer than the cooldown it is."""
    policy = Policy(Action.SKIP, cooldown=2)
    assert reported(policy, [1, 1, 1, 1, 1]) == [True, False, False, False, False]
    assert actions(policy, [1, 1, 1]) == ["skip"] * 3


def test_decide_cooldown_counts_steps_not_hits():
    """Healthy steps use it up too."""
    assert reported(Policy(Action.WARN, cooldown=2), [1, 0, 0, 1]) == [True, False, False, True]


def test_decide_cooldown_zero_reports_every_hit():
    """Nothing lasts then, and nothing ends."""
    assert lines(Policy(Action.WARN), [1, 1, 0, 1, 0]) == [(0, "warn"), (1, "warn"), (3, "warn")]


def test_decide_condition_that_is_over_says_how_long_it_lasted():
    """Once the cooldown has passed; from the first hit to the last, with the misses in between."""
    policy = Policy(Action.WARN, cooldown=3)
    decisions = play(policy, [1] * 100 + [0, 0] + [1] * 28 + [0] * 10)
    assert [step for step, decision in enumerate(decisions) if decision.ended] == [132]
    assert decisions[132].ended == (Ended("own", lasted=130, num_found=128, steps_ago=3),)


def test_decide_condition_of_a_few_steps_has_no_end():
    """The alert has said all; five steps are worth a line."""
    policy = Policy(Action.WARN, cooldown=2)
    assert lines(policy, [0, 1, 1, 0, 1, 0, 0, 0, 0]) == [(1, "warn")]
    assert lines(policy, [0, 1, 1, 0, 1, 1, 0, 0, 0]) == [(1, "warn"), (7, 5)]


@pytest.mark.parametrize("action", ["log", "warn"])
def test_decide_patience_without_a_stronger_action_is_silent(action):
    """What holds for less than `patience` steps is not mentioned, nor is its end."""
    policy = Policy(Action(action), patience=10, cooldown=5)
    assert lines(policy, ([1] * 9 + [0]) * 5) == []
    assert lines(policy, [1] * 130 + [0] * 6) == [(9, action), (134, 130)]


def test_decide_patience_held_back_still_stops():
    """`stop_after` may come first."""
    assert lines(Policy(Action.WARN, patience=10, stop_after=2, cooldown=5), [1, 1]) == [(1, "stop")]


def test_decide_stronger_actions_of_one_condition_are_each_reported():
    """It begins, is skipped, and stops the training."""
    policy = Policy(Action.SKIP, patience=3, stop_after=6, cooldown=5)
    assert lines(policy, [1] * 6) == [(0, "warn"), (2, "skip"), (5, "stop")]


@pytest.mark.parametrize(
    "pattern",
    [[1], [1, 0], [1, 1, 0], [1, 0, 0], [1] * 5 + [0] * 5, [1] + [0] * 9, [1, 1, 1] + [0] * 20, [1] * 30 + [0] * 30],
)
@pytest.mark.parametrize("cooldown", [1, 10, 50, 200])
def test_decide_thousand_steps_give_ten_lines_at_most(pattern, cooldown):
    """Whatever comes and goes."""
    hits = (pattern * 1000)[:1000]
    assert 1 <= len(lines(Policy(Action.SKIP, cooldown=cooldown), hits)) <= 10


def test_decide_dire_condition_is_reported_again_at_growing_distances():
    """Nobody pays for days of it unwarned."""
    dire = replace(HIT, is_dire=True)
    told = [step for step, _ in lines(Policy(Action.WARN, cooldown=200), [1] * 1000, dire)]
    assert told == [0, 25, 50, 100, 200, 400, 800]


def test_decide_note_is_logged_and_counts_for_nothing():
    """Whatever the action; a hit right after it is news."""
    note = replace(HIT, is_note=True)
    policy = Policy(Action.RAISE, stop_after=1, cooldown=10)
    decision, (streak,) = decide(0, [policy], (Streak(),), [note], kinds=["own"])
    assert (decision.actions, decision.alerting, decision.skip) == ((Action.LOG,), (True,), False)
    assert streak == Streak()


def test_streak_restored_is_the_same():
    """Through plain values, also in the middle of a condition."""
    streak = Streak(2, 5, 8, 3, 2, 5, Action.SKIP)
    assert Streak.from_state(streak.state_dict()) == streak
    assert Streak.from_state(Streak().state_dict()) == Streak()


def test_streak_of_an_earlier_version_goes_on():
    """Hits, and step and action of the last alert."""
    assert Streak.from_state([0, None, None]) == Streak()
    policy = Policy(Action.SKIP, stop_after=5, cooldown=10)
    streak, action, is_reported = Streak.from_state([4, 20, "skip"]).hit(24, policy, HIT)
    assert (streak.hits, action, is_reported) == (5, Action.STOP, True)


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
    decision, _ = decide(0, policies, (Streak(),) * 4, [HIT, HIT, HIT, None], kinds="abcd")
    assert decision.action is Action.STOP
    assert decision.actions == (Action.WARN, Action.STOP, Action.SKIP)
    assert decision.skip


def test_decide_several_detectors_counts_each_apart():
    """One detector's hits don't use up another's patience."""
    policies = [Policy(Action.SKIP, patience=2), Policy(Action.SKIP, patience=2)]
    _, streaks = decide(0, policies, (Streak(), Streak()), [HIT, None], kinds="ab")
    decision, _ = decide(1, policies, streaks, [None, HIT], kinds="ab")
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
    streaks = (Streak(2, 0, 1, 2, 1, 0, Action.WARN),)
    decide(5, [policy], streaks, [HIT], kinds=["own"])
    assert streaks == (Streak(2, 0, 1, 2, 1, 0, Action.WARN),)


@examples
@given(st.lists(st.booleans(), max_size=60), st.integers(0, 5))
def test_decide_hit_after_silence_is_reported(hits, cooldown):
    """Silent is only what follows another hit within the cooldown, which grows where hits recur."""
    told = reported(Policy(Action.WARN, cooldown=cooldown), hits)
    num_reported, last = 0, None
    for step, hit in enumerate(hits):
        if hit and (last is None or step - last > cooldown * 10 ** max(num_reported - 2, 0)):
            assert told[step]
        elif not hit:
            assert not told[step]
        num_reported += told[step]
        last = step if hit else last


def test_streak_of_a_damaged_state_reminds_of_nothing():
    """When it was told is missing."""
    streak = Streak(began_at=0, last_at=3, num_found=4, num_recent=1, alerted_action=Action.WARN)
    after, action, is_told = streak.hit(900, Policy(Action.WARN, cooldown=1000), replace(HIT, is_dire=True))
    assert (after.num_found, action, is_told) == (5, Action.WARN, False)

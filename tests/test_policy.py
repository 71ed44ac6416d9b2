"""Actions, and how repeated hits turn into them."""

from __future__ import annotations

import itertools
import pickle

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Action
from lightning_gradguard.policy import Policy, to_action

NAMES = ["log", "warn", "skip", "rollback", "stop", "raise"]
ACTIONS = st.sampled_from(list(Action))


@pytest.mark.parametrize(("milder", "stronger"), list(itertools.combinations(NAMES, 2)))
def test_action_compared_orders_by_severity(milder, stronger):
    """All four comparisons follow severity, with members and with names."""
    a, b = Action(milder), Action(stronger)
    assert a < b
    assert a <= stronger
    assert b > milder
    assert b >= a
    assert not b < a
    assert not b <= milder
    assert not a > stronger
    assert not a >= b


@pytest.mark.parametrize("name", NAMES)
def test_action_compared_with_itself_is_equal(name):
    """An action is neither below nor above itself, and equals its name."""
    action = Action(name)
    assert action == name
    assert action <= name
    assert action >= name
    assert not action < name
    assert not action > name


def test_action_from_skip_on_skips():
    """Log and warn let the step through, all others skip it."""
    assert [action.skips for action in Action] == [False, False, True, True, True, True]


@pytest.mark.parametrize("name", NAMES)
def test_action_as_text_is_its_name(name):
    """Messages and JSON show the name."""
    assert str(Action(name)) == f"{Action(name)}" == name


@pytest.mark.parametrize("action", list(Action))
def test_action_pickled_is_the_same_member(action):
    """Alerts travel between processes."""
    assert pickle.loads(pickle.dumps(action)) is action


def test_action_compared_with_an_unknown_name_raises():
    """A typo is not ordered somewhere."""
    with pytest.raises(ValueError, match="explode"):
        _ = Action.SKIP < "explode"


@pytest.mark.parametrize("name", NAMES)
def test_to_action_name_or_member_gives_the_member(name):
    """Both spellings are read."""
    assert to_action(name, parameter="action") is to_action(Action(name), parameter="action") is Action(name)


@examples
@given(action=ACTIONS, patience=st.integers(1, 6), hits=st.integers(1, 12))
def test_policy_before_patience_never_does_more_than_warn(action, patience, hits):
    """Until `patience` hits it warns, or logs where the action is milder; then it takes the action."""
    expected = action if hits >= patience else min(action, Action.WARN)
    assert Policy(action, patience=patience).act(hits) is expected


@examples
@given(action=ACTIONS, patience=st.integers(1, 6), stop_after=st.integers(1, 6), hits=st.integers(1, 12))
def test_policy_with_stop_after_stops_whatever_the_action(action, patience, stop_after, hits):
    """From `stop_after` hits in a row on it is "stop", or "raise" where that is the action already taken."""
    taken = Policy(action, patience=patience, stop_after=stop_after).act(hits)
    without = Policy(action, patience=patience).act(hits)
    assert taken is (max(without, Action.STOP) if hits >= stop_after else without)


@examples
@given(action=ACTIONS, patience=st.integers(1, 6), stop_after=st.none() | st.integers(1, 6))
def test_policy_over_a_run_of_hits_only_escalates(action, patience, stop_after):
    """More hits never lead to a milder action."""
    policy = Policy(action, patience=patience, stop_after=stop_after)
    taken = [policy.act(hits) for hits in range(1, 12)]
    assert taken == sorted(taken)

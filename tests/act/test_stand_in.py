"""What stands in for a method of one object."""

from __future__ import annotations

import copy
import pickle

import pytest

from lightning_gradguard.act.stand_in import StandIn


class Counter:
    """Has a method."""

    def add(self, number=1):
        """One more than the number."""
        return number + 1


def test_stand_in_is_called_with_the_method_and_goes_without_a_trace():
    """The object is as it was."""
    counter = Counter()
    stand_in = StandIn(counter, "add", lambda method, *args, **kwargs: 10 * method(*args, **kwargs))
    assert counter.add(number=2) == 30
    stand_in.remove()
    assert vars(counter) == {}
    assert counter.add() == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_deep_copies_of_the_object_have_their_own_method(copied):
    """Nobody watches those."""
    counter = Counter()
    stand_in = StandIn(counter, "add", lambda method: -method())
    other = copied(counter)
    assert (counter.add(), other.add()) == (-2, 2)
    assert other.add is not stand_in


def test_what_stood_there_before_comes_back():
    """Somebody else may have put it there."""
    counter = Counter()
    counter.add = before = lambda: 7
    StandIn(counter, "add", lambda method: method() + 1).remove()
    assert counter.add is before


def test_wrapper_that_was_put_around_it_stays_and_calls_pass_through():
    """It is not ours to remove."""
    counter = Counter()
    stand_in = StandIn(counter, "add", lambda method: -method())
    inner = counter.add
    counter.add = wrapper = lambda: inner() + 100
    assert counter.add() == 98
    stand_in.remove()
    assert counter.add is wrapper
    assert counter.add() == 102


def test_attributes_are_those_of_the_method():
    """Some look for marks on it; special ones are its own."""
    counter = Counter()
    counter.add = lambda: 1
    counter.add.mark = 5
    stand_in = StandIn(counter, "add", lambda method: method())
    assert stand_in.mark == 5
    assert not hasattr(stand_in, "__wrapped__")

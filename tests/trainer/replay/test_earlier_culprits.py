"""The culprit of the alert that ends a run, beside those that were named before."""

from __future__ import annotations

from lightning_gradguard.alert import Culprit
from lightning_gradguard.trainer.replay.earlier import EarlierCulprits

BIRTH = Culprit("forward", "net", op="div", line=3, message="`div` divided 0 by 0", samples=(2,), reproduced=True)


def final_of(culprit, earlier=BIRTH, kind="nonfinite"):
    """After an earlier one at step 7."""
    found = EarlierCulprits()
    found.note(0, "nonfinite", 7, earlier)
    return found.final(0, kind, culprit)


def test_same_culprit_stays_as_it_is():
    """Rows differ from step to step."""
    again = Culprit("forward", "net", op="div", line=3, message="`div` divided 0 by 0", samples=(5,))
    assert final_of(again) is again


def test_other_culprit_is_named_beside_the_earlier_one():
    """The weights are NaN by now, since the first step was applied."""
    later = Culprit("weights", "net.weight", message="`net.weight` holds NaN")
    assert final_of(later).message == "`net.weight` holds NaN (at step 7 it was: `div` divided 0 by 0)"


def test_earlier_culprit_stands_in_where_a_replay_shows_nothing():
    """And says so; its rows are not those of this batch."""
    found = final_of(None)
    assert found.message == "the replay of this step shows nothing; at step 7 it was: `div` divided 0 by 0"
    assert (found.op, found.samples, found.reproduced) == ("div", None, False)


def test_culprits_of_other_kinds_and_optimizers_are_no_concern():
    """Nor is there always an earlier one."""
    assert final_of(None, kind="explosion") is None
    assert final_of(None, earlier=None) is None


def test_two_leaves_of_the_data_do_not_contradict():
    """Another batch may be bad in another leaf."""
    assert final_of(Culprit("data", "batch[1]"), Culprit("data", "batch[0]")).message == ""

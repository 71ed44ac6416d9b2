"""Robust running statistics."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from builders import examples, through_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.statistics.baseline import MAD_TO_SIGMA, LogBaseline
from lightning_gradguard.statistics.baselines import LogBaselines

VALUES = st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=40)
UNUSABLE = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0])


def filled(values, **settings):
    """A baseline that has seen these values."""
    baseline = LogBaseline(**({"window": 16, "recent": 4, "min_mad": 0.1} | settings))
    for value in values:
        baseline.add(value)
    return baseline


@examples
@given(VALUES)
def test_baseline_median_and_sigma_equal_the_standard_library(values):
    """The larger of two medians, and the MAD around the window's own."""
    baseline = filled(values)
    logs = [math.log(value) for value in values[-16:]]
    median = statistics.median(logs)
    mad = statistics.median(abs(value - median) for value in logs)
    assert baseline.median == pytest.approx(max(median, statistics.median(logs[-4:])))
    assert baseline.sigma == pytest.approx(1.4826 * max(mad, 0.1))


@examples
@given(VALUES, st.sampled_from([1.5, 5.0, 1e3]), st.sampled_from([0.5, 3.0, 8.0]))
def test_baseline_distance_equals_its_formula(values, ratio, z):
    """Also where the spread is not computed, since it would not count."""
    baseline = filled(values)
    assert baseline.distance(ratio, z) == pytest.approx(max(math.log(ratio), z * baseline.sigma))


def test_mad_to_sigma_is_that_of_a_normal_distribution():
    """1 / Phi^-1(3/4)."""
    assert pytest.approx(1 / statistics.NormalDist().inv_cdf(0.75), rel=1e-4) == MAD_TO_SIGMA


@examples
@given(VALUES, st.integers(0, 40), st.lists(UNUSABLE, min_size=1, max_size=50))
def test_baseline_unusable_values_change_nothing(values, where, unusable):
    """NaN, infinities, zero and negative values never enter."""
    spoiled = values[:where] + unusable + values[where:]
    assert filled(spoiled).state_dict() == filled(values).state_dict()


@examples
@given(VALUES, st.floats(1e-3, 1e3))
def test_baseline_scaled_values_shift_the_median_only(values, factor):
    """A multiple of the loss moves the median by its logarithm and leaves the spread."""
    plain, scaled = filled(values), filled([factor * value for value in values])
    assert scaled.median == pytest.approx(plain.median + math.log(factor), abs=1e-9)
    assert scaled.sigma == pytest.approx(plain.sigma, abs=1e-9)


@examples
@given(st.floats(1e-30, 1e30))
def test_baseline_single_outlier_moves_neither_statistic(outlier):
    """Fifteen equal values and one other."""
    baseline = filled([1.0] * 15 + [outlier], recent=8)
    assert baseline.median == 0.0
    assert baseline.sigma == pytest.approx(MAD_TO_SIGMA * 0.1)


def test_baseline_rising_values_are_followed_by_the_recent_median():
    """A healthy climb raises the limit within a few steps."""
    values = np.exp(np.linspace(0, 5, 16))
    baseline = filled(values)
    assert baseline.median == pytest.approx(np.median(np.log(values[-4:])))


def test_baseline_falling_values_keep_the_windows_median():
    """The limit stays up while the norm comes down."""
    values = np.exp(np.linspace(5, 0, 16))
    assert filled(values).median == pytest.approx(np.median(np.log(values)))


def test_baseline_added_value_is_seen_at_once():
    """The remembered statistics are those of the present window."""
    baseline = filled([1.0])
    assert baseline.median == 0.0
    baseline.add(math.e**2)
    assert baseline.median == 1.0


def test_baseline_full_window_drops_the_oldest():
    """No more than `window` values are kept."""
    baseline = filled(range(1, 100))
    assert len(baseline) == 16
    assert baseline.state_dict()["values"] == [math.log(value) for value in range(84, 100)]


def test_baseline_restart_forgets_what_was():
    """A new level becomes the history; unusable values stay out of it, too."""
    baseline = filled([1.0] * 10)
    assert baseline.median == 0.0
    baseline.restart([math.e, math.nan, math.e])
    assert len(baseline) == 2
    assert baseline.median == 1.0


@examples
@given(VALUES, VALUES)
def test_baseline_restored_continues_alike(before, after):
    """Through a checkpoint, to the last bit."""
    through, resumed = filled(before), filled([5.0, 6.0])
    _ = resumed.median
    resumed.load_state_dict(through_checkpoint(through.state_dict()))
    for value in after:
        assert (resumed.median, resumed.sigma) == (through.median, through.sigma)
        through.add(value)
        resumed.add(value)
    assert resumed.state_dict() == through.state_dict()


def test_baseline_restored_into_a_shorter_window_keeps_the_last():
    """A run may be resumed with another window."""
    resumed = LogBaseline(window=3, recent=2)
    resumed.load_state_dict(filled(range(1, 10)).state_dict())
    assert resumed.state_dict()["values"] == [math.log(value) for value in (7, 8, 9)]


def many(window=8):
    """Baselines of two parts, filled."""
    baselines = LogBaselines(window=window, warmup=2, ratio=5.0, z=8.0)
    baselines.add(np.log([3.0, 3.0]), math.log(3.0 * math.sqrt(2.0)))
    baselines.add_each(np.log(np.full((31, 2), 3.0)), np.log(np.full(31, 3.0 * math.sqrt(2.0))))
    return baselines


def test_baselines_of_many_take_several_steps_up_to_a_refresh_and_of_as_many_parts():
    """Limits would be of another time, or of other parts."""
    baselines = many()
    for shape in ((33, 2), (1, 3)):
        with pytest.raises(ValueError, match="must lie between two refreshes"):
            baselines.add_each(np.zeros(shape), np.zeros(shape[0]))
    assert np.exp(baselines.limits()) == pytest.approx([15.0, 15.0])


def test_baselines_of_many_restored_into_another_window_start_afresh():
    """Into the same one they go on."""
    state = through_checkpoint(many().state_dict())
    same, other = LogBaselines(window=8, warmup=2, ratio=5.0, z=8.0), LogBaselines(window=4, warmup=2, ratio=5.0, z=8.0)
    same.load_state_dict(state)
    other.load_state_dict(state)
    assert same.state_dict() == state
    assert other.limits().tolist() == [math.inf, math.inf]
    assert other.num_left == 32

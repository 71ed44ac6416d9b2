"""What every detector has to keep to, its author's own included."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from builders import examples, judge, measurement, no_gradients, through_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Detector, Explosion, NonFinite, UpdateRatio, Vanishing, Verdict
from lightning_gradguard.detectors.overflow import Overflow


class Largest(Detector):
    """A detector as a user would write it: a hit where the norm is ten times the largest learned so far."""

    name = "largest"

    def __init__(self, action="warn"):
        super().__init__(action)
        self.largest = math.inf

    def limit(self):
        return 10.0 * self.largest

    def observe(self, measurement):
        if measurement.global_norm > self.limit():
            return Verdict(self.name, measurement.global_norm, self.limit(), "the norm is a record", "do nothing")
        return None

    def learn(self, measurement):
        known = 0.0 if math.isinf(self.largest) else self.largest
        self.largest = max(known, measurement.global_norm) or math.inf

    def state_dict(self):
        return {"largest": self.largest}

    def load_state_dict(self, state):
        self.largest = state["largest"]


MAKERS = {
    "nonfinite": lambda: NonFinite("warn"),
    "explosion": lambda: Explosion(window=12, warmup_steps=4, adapt_after=3),
    "explosion-absolute": lambda: Explosion(ratio=None, max_norm=20.0),
    "vanishing": lambda: Vanishing(persistence=2, warmup_steps=3),
    "overflow": lambda: Overflow(max_in_a_row=2),
    "update-ratio": lambda: UpdateRatio(persistence=2, min_ratio=1e-3),
    "own": Largest,
}
every_detector = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def stream(length=60, seed=0):
    """Steps of a five-layer network: noise, with spikes, dying layers, zeros, NaN, Inf, overflows and updates in between."""
    rng = np.random.default_rng(seed)
    for step in range(length):
        norms = np.exp(rng.normal(0.0, 0.3, size=5))
        if step % 11 in (7, 8, 9, 10):
            norms *= 300.0 if step % 2 else 10.0 ** np.arange(-8, 2, 2)
        if step % 13 in (10, 11, 12):
            norms[1] = 0.0
        if step % 17 == 16:
            norms[2] = (math.nan, math.inf)[step % 2]
        if step % 19 > 14:
            norms[4] = math.inf
        one = measurement(norms.tolist(), loss=1.0, loss_scale=512.0 if step % 19 > 14 else None)
        updates = np.array([math.nan, 1.0, 0.5, 0.0, 1e-4]) * (2.0, 0.8, 0.8, 1e-4, 1e-4, 0.1)[step % 6]
        yield replace(one, update_ratios=updates) if step % 5 else one


def verdicts(detector, steps):
    """What it says about each step, and the limit that held; as text, since NaN equals nothing."""
    return [f"{detector.limit()!r} {judge(detector, step)!r}" for step in steps]


@every_detector
def test_stream_of_incidents_gives_verdicts(make):
    """The steps on which this suite rests hold both hits and misses for each detector."""
    found = [judge(detector, step) for detector in [make()] for step in stream()]
    assert any(found)
    assert not all(found)


@every_detector
@pytest.mark.parametrize("split", [0, 1, 9, 31, 44])
def test_state_after_round_trip_continues_bit_identically(make, split):
    """Saved and loaded anywhere, a fresh detector goes on as the old one does."""
    steps = list(stream())
    through, resumed = make(), make()
    verdicts(through, steps[:split])
    resumed.load_state_dict(through_checkpoint(through.state_dict()))
    assert verdicts(through, steps[split:]) == verdicts(resumed, steps[split:])
    assert resumed.state_dict() == through.state_dict()


@every_detector
def test_state_saved_is_not_changed_by_later_steps(make):
    """A checkpoint that is still in memory shares nothing with the running detector."""
    detector, steps = make(), list(stream())
    verdicts(detector, steps[:30])
    state = detector.state_dict()
    before = copy.deepcopy(state)
    verdicts(detector, steps[30:])
    assert state == before


@every_detector
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_detector_copied_continues_alone(make, clone):
    """A copy goes on alike, and leaves the original where it was."""
    steps = list(stream())
    original = make()
    verdicts(original, steps[:30])
    twin = clone(original)
    before = original.state_dict()
    told = verdicts(twin, steps[30:])
    assert original.state_dict() == before
    assert verdicts(original, steps[30:]) == told


ODD = {
    "nan": lambda: measurement([1.0, math.nan]),
    "inf": lambda: measurement([1.0, math.inf]),
    "nan-loss": lambda: measurement([1.0, 1.0], loss=math.nan),
    "no-gradients": no_gradients,
    "no-parameters-moved": lambda: measurement([0.0, 0.0]),
    "one-parameter": lambda: measurement([1.0]),
    "overflowed": lambda: measurement([1e30, 1e39], overflowed=True),
    "beyond-squares": lambda: measurement([1e200] * 6),
    "below-squares": lambda: measurement([1e-200] * 6),
    "deep": lambda: measurement([1.0] * 100),
}


@every_detector
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_detector_on_odd_steps_survives(make, odd):
    """Nothing raises or warns, a verdict is one of its own, and the limit stays a positive number."""
    detector = make()
    for _ in range(30):
        for _ in range(10):
            verdict = judge(detector, odd())
            assert verdict is None or verdict.kind == detector.name
            assert detector.limit() > 0.0
        judge(detector, measurement([1.0, 1.0]))


@every_detector
def test_detector_on_constant_norms_finds_nothing(make):
    """Zero variance is not a reason to divide by it."""
    detector = make()
    assert not any(judge(detector, measurement([1.0, 1.0, 1.0, 1.0, 1.0], loss=1.0)) for _ in range(100))


BAD = [
    measurement([1.0, math.nan, 1.0, 1.0, 1.0], loss=1.0),
    measurement([1.0, math.inf, 1.0, 1.0, 1.0], loss=1.0),
    measurement([1.0] * 5, loss=math.nan),
]


@every_detector
@examples
@given(seed=st.integers(0, 10_000), where=st.integers(0, 59), bad=st.sampled_from(BAD), repeats=st.integers(1, 40))
def test_detector_after_nonfinite_steps_judges_as_without_them(make, seed, where, bad, repeats):
    """Not one later verdict or limit changes, however many of them there were."""
    finite = [step for step in stream(seed=seed) if step.is_finite]
    untouched, disturbed = make(), make()
    expected = verdicts(untouched, finite[:where]) + verdicts(untouched, finite[where:])
    told = verdicts(disturbed, finite[:where])
    for _ in range(repeats):
        judge(disturbed, bad)
    assert told + verdicts(disturbed, finite[where:]) == expected


@every_detector
@examples
@given(seed=st.integers(0, 10_000))
def test_detector_judging_changes_no_measurement(make, seed):
    """Other detectors and the sinks see the same figures."""
    detector = make()
    for step in stream(seed=seed):
        before = step.norms.copy()
        judge(detector, step)
        assert np.array_equal(step.norms, before, equal_nan=True)


def test_detectors_built_in_have_distinct_names():
    """Names are the alerts' kinds, and keys in the state."""
    assert [cls.name for cls in (NonFinite, Overflow, Explosion, Vanishing, UpdateRatio)] == [
        "nonfinite",
        "overflow",
        "explosion",
        "vanishing",
        "update_ratio",
    ]

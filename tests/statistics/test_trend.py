"""Where norm and loss are heading."""

from __future__ import annotations

import math

import numpy as np
import pytest
from builders import examples, measurement, through_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Explosion
from lightning_gradguard.statistics.trend import Trend

RISING, FALLING = 1.0, -1.0


def filled(steps, *, rate=1.05, loss=RISING, noise=0.2, scale=1.0, shift=0.0, seed=0):
    """A trend of a norm that grows by `rate` a step, and a loss that moves by one percent a step."""
    rng, trend = np.random.default_rng(seed), Trend()
    for step in range(steps):
        norm = scale * rate**step * math.exp(rng.normal(0.0, noise))
        trend.add(norm, shift + scale * (5.0 + loss * 0.01 * step + rng.normal(0.0, 0.05)))
    return trend


def test_trend_norm_and_loss_that_rise_is_growth():
    """Five percent a step, twentyfold in 64; with seven blocks of eight there is no saying."""
    assert filled(64).grows(by=5.0)
    assert not filled(63).grows(by=5.0)
    assert not filled(64).grows(by=50.0)


def test_trend_norm_that_rises_while_the_loss_falls_is_no_growth():
    """A model that starts to learn."""
    assert not filled(64, loss=FALLING).grows(by=5.0)
    assert filled(64, loss=FALLING).loss_falls
    assert not filled(64).loss_falls


def test_trend_norm_that_jumps_and_stays_is_no_growth():
    """A change of the data: one rise, however high, is not a trend."""
    trend = Trend()
    for step in range(64):
        trend.add(20.0 if step >= 30 else 1.0, 2.0 if step >= 30 else 1.0)
    assert not trend.grows(by=5.0)


@examples
@given(st.floats(1e-6, 1e6), st.floats(-100.0, 100.0), st.sampled_from([RISING, FALLING]), st.integers(0, 100))
def test_trend_loss_times_a_constant_changes_nothing(scale, shift, loss, seed):
    """Nor does a constant that is added to it."""
    for plain, other in [
        (filled(80, loss=loss, seed=seed), filled(80, loss=loss, seed=seed, scale=scale)),
        (filled(80, loss=loss, seed=seed), filled(80, loss=loss, seed=seed, shift=shift)),
    ]:
        assert (plain.grows(by=5.0), plain.loss_falls) == (other.grows(by=5.0), other.loss_falls)


@examples
@given(st.sampled_from([(math.nan, 1.0), (math.inf, 1.0), (0.0, 1.0), (1.0, math.nan), (1.0, math.inf), (math.inf, None)]))
def test_trend_unusable_steps_change_nothing(step):
    """Neither block nor count."""
    trend = filled(70)
    before = trend.state_dict()
    trend.add(*step)
    assert trend.state_dict() == before


@pytest.mark.parametrize("split", [0, 5, 8, 40, 64])
def test_trend_restored_continues_alike(split):
    """Through a checkpoint, inside a block and between two."""
    through, resumed = filled(split), Trend()
    resumed.load_state_dict(through_checkpoint(through.state_dict()))
    for step in range(70):
        assert (through.grows(by=2.0), through.loss_falls) == (resumed.grows(by=2.0), resumed.loss_falls)
        for trend in (through, resumed):
            trend.add(1.05**step, 1.0 + step)
    assert through.state_dict() == resumed.state_dict()


def test_trend_restarted_knows_nothing():
    """As a new one."""
    trend = filled(70)
    trend.restart()
    assert trend.state_dict() == Trend().state_dict()


def judged(detector, norms, losses):
    """The findings at each step; those that are hits are not learned."""
    found = []
    for norm, loss in zip(norms, losses, strict=True):
        step = measurement([norm, norm], loss=loss)
        verdict = detector.observe(step)
        found.append(verdict)
        if verdict is None:
            detector.learn(step)
    return found


def test_explosion_slow_growth_with_the_loss_warns_whatever_the_action():
    """Five percent a step, which every median follows; once for each eight steps."""
    steps = range(160)
    found = judged(Explosion("skip"), [1.05 ** max(step - 64, 0) for step in steps], [1.0 + 0.01 * step for step in steps])
    hits = [step for step, verdict in enumerate(found) if verdict is not None]
    assert 64 < hits[0] < 64 + 64
    assert hits[1] - hits[0] == 9
    assert all(verdict.is_advisory for verdict in found if verdict is not None)
    assert "keeps growing" in found[hits[0]].message


def test_explosion_climb_while_the_loss_falls_is_followed():
    """A quarter more at each of fifteen steps, as a model starts to learn; the same with a steady loss is a hit."""
    norms = [1.25 ** min(max(step - 60, 0), 15) for step in range(100)]
    falling = [1.0 - 0.01 * max(step - 52, 0) for step in range(100)]
    assert not any(judged(Explosion(), norms, falling))
    assert any(judged(Explosion(), norms, [1.0] * 100))

"""Steps that are judged later, several together, lead to what each of them would have led to at once."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_gradguard.alert import ParameterReport
from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, UpdateRatio, Vanishing
from lightning_gradguard.detectors.base import Deferral
from lightning_gradguard.judge.judge import Judge
from lightning_gradguard.layout import Layout
from lightning_gradguard.record import Damage, Measurement, Verdict

LAYOUT = Layout.of([f"layers.{index}.{kind}" for index in range(6) for kind in ("weight", "bias")], [(8, 8), (8,)] * 6)
NUM_STEPS = 400


def detectors():
    """As a guard has them by default."""
    return [NonFinite(), Overflow(), Explosion("stop", stop_after=None), Vanishing()]


def _spikes(norms, step, random):
    return norms * np.exp(random.uniform(0.0, 8.0)) if random.random() < 0.03 else norms


def _one_parameter(norms, step, random):
    norms[4] *= 300.0 if step in range(150, 170) else 1.0
    return norms


def _growth(norms, step, random):
    return norms * 1.06 ** max(step - 150, 0)


def _waves(norms, step, random):
    return norms * np.exp(2.5 * np.sin(step / 25.0))


def _dies(norms, step, random):
    norms[2] *= step < 100
    return norms


def _unused(norms, step, random):
    norms[2] = 0.0
    return norms


def _branch(norms, step, random):
    norms[2] *= 100 <= step < 106 + random.integers(3)
    return norms


def _rests(norms, step, random):
    norms[2] *= random.random() < 0.1
    return norms


def _sinks(norms, step, random):
    return norms * (1e-6 if step >= 150 else 1.0)


def _fades(norms, step, random):
    return norms * np.repeat(10.0 ** np.arange(-5.0, 1.0), 2) if step >= 100 else norms


def _unfreezes(norms, step, random):
    norms[:2] *= step >= 160
    return norms


def _damage(norms, step, random):
    norms[7] *= np.nan if random.random() < 0.05 else 1.0
    return norms


CHANGES = {
    "calm": None,
    "noisy": None,
    "uneven": None,
    "no loss": None,
    "spikes": _spikes,
    "one parameter": _one_parameter,
    "growth": _growth,
    "waves": _waves,
    "dies": _dies,
    "unused": _unused,
    "branch": _branch,
    "rests": _rests,
    "sinks": _sinks,
    "fades": _fades,
    "unfreezes": _unfreezes,
    "damage": _damage,
}


def steps(kind, seed):
    """Measurements of a made-up training."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.normal(0.0, 3.0 if kind == "uneven" else 0.3, len(LAYOUT.names)))
    for step in range(NUM_STEPS):
        norms = scales * np.exp(random.normal(0.0, 0.8 if kind == "noisy" else 0.2, len(scales)))
        loss = float(3.0 * np.exp(-step / 200.0) + random.normal(0.0, 0.1) + 0.01 * (kind == "growth") * max(step - 150, 0))
        loss += 3.0 * (kind == "sinks" and step >= 150)
        if (change := CHANGES[kind]) is not None:
            norms = change(norms, step, random)
        has_grad = np.ones(len(norms), dtype=np.bool_)
        has_grad[:2] = kind != "unfreezes" or step >= 120
        bad = tuple(ParameterReport(LAYOUT.names[index], np.nan, num_nan=1) for index in np.flatnonzero(np.isnan(norms)))
        yield Measurement(
            LAYOUT,
            norms,
            has_grad,
            float(np.sqrt((norms**2).sum())),
            loss=None if kind == "no loss" else loss,
            damage=Damage(0) if bad else None,
            nonfinite=bad,
        )


class OwnLimit(Detector):
    """One of the user's that says how far it can wait, and leaves the rest as it is."""

    name = "own"

    def __init__(self):
        super().__init__("warn")
        self.num_seen = 0

    def observe(self, measurement: Measurement) -> Verdict | None:
        self.num_seen += 1
        return Verdict("own", measurement.global_norm, 40.0, "large", "none") if measurement.global_norm > 40.0 else None

    def deferral(self) -> Deferral | None:
        return Deferral(7, 40.0)

    def state_dict(self):
        return {"num_seen": self.num_seen}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("seed", range(3))
def test_deferred_steps_lead_to_the_same_verdicts_limits_and_state(kind, seed):
    """Step by step, and whenever somebody looks."""
    plain, deferring = Judge(detectors()), Judge(detectors(), can_defer=True)
    random = np.random.default_rng(seed)
    num_deferred = 0
    for measurement in steps(kind, seed):
        judgement = plain.judge(measurement)
        if deferring.defer(measurement):
            num_deferred += 1
            assert judgement.verdicts == ()
            assert not judgement.decision.skip
            if random.random() < 0.1:
                deferring.catch_up()
                assert deferring.last_limit == judgement.limit
        else:
            again = deferring.judge(measurement)
            assert again.decision == judgement.decision
            assert again.limit == judgement.limit
            assert [verdict.message for verdict in again.verdicts] == [verdict.message for verdict in judgement.verdicts]
    assert deferring.state_dict() == plain.state_dict()
    assert num_deferred > (NUM_STEPS // 2 if CHANGES[kind] is None else 0)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Explosion("stop", max_norm=30.0, ratio=None),
        lambda: Explosion(min_share=None, adapt_after=3),
        lambda: Explosion(window=4, warmup_steps=2),
        UpdateRatio,
        OwnLimit,
    ],
    ids=["absolute", "norm alone", "short", "update ratio", "own"],
)
@pytest.mark.parametrize("kind", ["calm", "growth", "spikes", "one parameter"])
def test_deferred_steps_lead_to_the_same_with_other_settings(made, kind):
    """Whatever a detector looks at, and with the default way to catch up."""
    plain, deferring = Judge([made()]), Judge([made()], can_defer=True)
    num_deferred = 0
    for measurement in steps(kind, 0):
        expected = plain.judge(measurement)
        if deferring.defer(measurement):
            num_deferred += 1
            assert (expected.verdicts, expected.decision.skip) == ((), False)
        else:
            assert deferring.judge(measurement).decision == expected.decision
    assert deferring.state_dict() == plain.state_dict()
    assert num_deferred


def test_own_detector_without_a_word_about_it_defers_nothing():
    """So that nothing escapes it."""
    assert OwnLimit().can_defer(next(steps("calm", 0)))
    assert Detector.deferral(OwnLimit()) is None


@pytest.mark.parametrize(
    ("names", "shapes", "scale"),
    [(["a.scale", "b.bias"], [(8,), (8,)], 1.0), (["a.weight"], [(8, 8)], 1e150), (["a.weight"], [(8, 8)], 1e-14)],
)
def test_vanishing_looks_at_unusual_models_and_norms_as_if_nothing_had_been_deferred(names, shapes, scale):
    """No module that could die, a norm that float64 can't square, and one as small as that of a loss at its end."""
    layout = Layout.of(names, shapes)
    plain, deferring = Judge([Vanishing()]), Judge([Vanishing()], can_defer=True)
    for step in range(60):
        norms = np.full(len(names), scale * (1.0 + step % 3))
        measurement = Measurement(layout, norms, np.ones(len(names), dtype=np.bool_), float(norms.max()), loss=0.0)
        assert plain.judge(measurement).verdicts == ()
        assert deferring.defer(measurement) or deferring.judge(measurement).verdicts == ()
    assert deferring.state_dict() == plain.state_dict()


def test_state_that_is_saved_amid_deferred_steps_resumes_to_the_same_end():
    """Whether or not anybody saves."""
    whole, first = Judge(detectors(), can_defer=True), Judge(detectors(), can_defer=True)
    for number, measurement in enumerate(steps("spikes", 0)):
        assert whole.defer(measurement) or whole.judge(measurement)
        if number % 37 == 5:
            resumed = Judge(detectors(), can_defer=True)
            resumed.load_state_dict(first.state_dict())
            first = resumed
        assert first.defer(measurement) or first.judge(measurement)
    assert first.state_dict() == whole.state_dict()


def test_detector_of_the_users_own_is_told_of_each_step_at_once():
    """Also a subclass of one that could wait."""

    class Watching(Explosion):
        def observe(self, measurement: Measurement) -> Verdict | None:
            seen.append(measurement)
            return super().observe(measurement)

    class Own(Detector):
        name = "own"

        def observe(self, measurement: Measurement) -> Verdict | None:
            seen.append(measurement)

    for detector in (Watching(), Own()):
        seen: list[Measurement] = []
        judge = Judge([NonFinite(), detector], can_defer=True)
        for measurement in steps("calm", 0):
            assert not judge.defer(measurement)
            judge.judge(measurement)
            assert seen[-1] is measurement


def test_steps_whose_norm_float32_could_not_square_and_those_with_a_scale_are_judged_at_once():
    """The guard does not know enough of them."""
    judge = Judge(detectors(), can_defer=True)
    norms, has_grad = np.ones(len(LAYOUT.names)), np.ones(len(LAYOUT.names), dtype=np.bool_)
    for more in ({"overflowed": True}, {"loss_scale": 2.0}, {"damage": Damage(0, loss=np.nan)}):
        assert not judge.defer(Measurement(LAYOUT, norms, has_grad, 3.0, **more))

"""What each built-in detector finds, and what it doesn't."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from builders import examples, judge, layers, measurement, no_gradients
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import Action, Explosion, Measurement, NonFinite, Vanishing, Verdict
from lightning_gradguard.detectors.overflow import Overflow
from lightning_gradguard.judge.decision import Streak
from lightning_gradguard.layout import Layout


def hits(detector, steps):
    """On which steps it fires."""
    return [index for index, step in enumerate(steps) if judge(detector, step) is not None]


def scalar(norms):
    """Steps of a model with one module."""
    return [measurement([float(norm)], loss=1.0) for norm in norms]


def test_nonfinite_default_is_to_skip_and_stop_after_five():
    """One bad batch is passed over; five in a row are no accident."""
    policy = NonFinite().policy
    assert (policy.action, policy.patience, policy.cooldown, policy.stop_after) == (Action.SKIP, 1, 1, 5)


@pytest.mark.parametrize(
    ("norms", "text"),
    [
        ([1.0, math.nan], r"`layers\.1\.weight` has 1 NaN element$"),
        ([math.inf, 1.0], r"`layers\.0\.weight` has 1 infinite element$"),
        ([math.nan, math.inf, 1.0], "and 1 more of 3 gradients are damaged"),
    ],
)
def test_nonfinite_message_names_the_worst_parameter(norms, text):
    """With its count, and how many others are damaged."""
    verdict = NonFinite().observe(measurement(norms))
    assert verdict.limit == math.inf
    assert re.search(text, verdict.message)


def test_nonfinite_overflowed_norm_is_no_hit():
    """Finite gradients whose norm float32 can't hold are Explosion's."""
    step = measurement([1e30], overflowed=True)
    assert NonFinite().observe(step) is None
    assert Explosion().observe(step) is not None


def test_overflow_while_the_scale_is_found_is_no_hit():
    """Ten in a row are calibration; the eleventh is not."""
    bad = measurement([math.inf], loss=1.0, loss_scale=2.0**20)
    assert hits(Overflow(), [bad] * 12) == [10, 11]
    assert hits(Overflow(), ([bad] * 10 + scalar([1.0])) * 3) == []
    assert hits(NonFinite(), [bad] * 12) == []


def test_overflow_with_a_collapsed_scale_is_a_hit():
    """Below 1 nothing is left to scale."""
    bad = measurement([math.nan], loss=1.0, loss_scale=0.5)
    verdict = Overflow().observe(bad)
    assert (verdict.value, verdict.limit) == (0.5, 1.0)


def test_overflow_without_a_scaler_never_fires():
    """NaN is then NonFinite's."""
    assert hits(Overflow(max_in_a_row=1), [measurement([math.nan])] * 5) == []


def test_explosion_default_warms_up_for_sixteen_steps():
    """Before that there is no relative limit."""
    detector = Explosion()
    for _ in range(15):
        judge(detector, measurement([1.0]))
        assert detector.limit() == math.inf
    judge(detector, measurement([1.0]))
    assert detector.limit() == pytest.approx(6.0)


@examples
@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1e6))
def test_explosion_absolute_limit_is_exact(max_norm, norm):
    """At the limit is in order, above it is not, from the first step on."""
    found = Explosion(max_norm=max_norm, ratio=None).observe(measurement([norm]))
    assert (found is not None) == (norm > max_norm)
    assert Explosion(max_norm=max_norm, ratio=None).observe(measurement([max_norm])) is None


def test_explosion_both_limits_the_smaller_counts():
    """Its message says which it was."""
    detector = Explosion(max_norm=3.0)
    for step in scalar([1.0] * 20):
        judge(detector, step)
    assert detector.limit() == 3.0
    assert "above max_norm=3" in detector.observe(measurement([4.0])).message
    relative = Explosion(max_norm=1e6)
    for step in scalar([1.0] * 20):
        judge(relative, step)
    assert "40 times its usual 1" in relative.observe(measurement([40.0])).message


@examples
@given(st.integers(0, 1000), st.integers(-8, 8))
def test_explosion_history_times_a_constant_scales_the_limit(seed, decades):
    """No verdict changes with the unit of the loss."""
    norms = np.exp(np.random.default_rng(seed).normal(0, 0.5, 40))
    plain, scaled = Explosion(), Explosion()
    for norm in norms:
        judge(plain, measurement([norm]))
        judge(scaled, measurement([norm * 10.0**decades]))
    assert scaled.limit() == pytest.approx(plain.limit() * 10.0**decades, rel=1e-9)


@examples
@given(st.integers(0, 1000))
def test_explosion_limit_equals_an_independent_formula(seed):
    """Median * max(ratio, exp(z * 1.4826 * MAD)) below its ceilings, by numpy over the last 64."""
    rng = np.random.default_rng(seed)
    norms = np.exp(rng.normal(0, rng.choice([0.2, 0.5, 1.5]), 80))
    detector = Explosion()
    for norm in norms:
        detector.learn(measurement([norm]))
    logs = np.log(norms[-64:])
    mad = max(np.median(np.abs(logs - np.median(logs))), 0.1)
    center = max(np.median(logs), np.median(logs[-16:]))
    limit = np.exp(center) * max(6.0, np.exp(8 * 1.4826 * mad))
    ceiling = min(24.0 * np.exp(np.median(logs)), max(6.0 * np.exp(center), 4.0 * np.sort(norms[-64:])[-2]))
    assert detector.limit() == pytest.approx(min(limit, ceiling), rel=1e-9)


def test_explosion_flagged_steps_do_not_raise_the_limit():
    """What was found to be wrong is no part of the history."""
    detector = Explosion()
    for step in scalar([1.0] * 30):
        judge(detector, step)
    before = detector.limit()
    assert judge(detector, measurement([1e6])) is not None
    assert detector.limit() == before


def test_explosion_norm_near_the_end_of_float64_keeps_a_finite_limit():
    """Exp would overflow."""
    detector = Explosion()
    for _ in range(20):
        detector.learn(measurement([1e308]))
    assert math.isfinite(detector.limit())


def test_explosion_beyond_float32_within_its_limit_says_so():
    """The norm overflowed though nothing forbids it."""
    assert "beyond what float32" in Explosion().observe(measurement([1e20], overflowed=True)).message


def fading(decades_per_module, count=8, size=1.0):
    """Norms that grow towards the output."""
    return [size * 10.0 ** (decades_per_module * (index - count + 1)) for index in range(count)]


def test_vanishing_fading_network_is_found_once_it_lasts():
    """From the warm-up on, and only after twenty steps."""
    found = hits(Vanishing(), [measurement(fading(1.0), loss=1.0)] * 60)
    assert found == list(range(30, 60))
    assert hits(Vanishing(warmup_steps=0), [measurement(fading(1.0), loss=1.0)] * 60)[0] == 19


def test_vanishing_message_names_where_the_gradient_is_lost():
    """Seen from the output."""
    detector = Vanishing(warmup_steps=0, persistence=1)
    verdict = detector.observe(measurement(fading(1.0), loss=1.0))
    assert "it is lost at `layers.3`" in verdict.message
    assert "1 decades a module" in verdict.message
    assert verdict.parameters[0].name == "layers.0.weight"
    assert verdict.value == pytest.approx(1e-7)


@pytest.mark.parametrize(
    "norms",
    [fading(0.1), fading(0.0), fading(-1.0), [1e-8] * 8, fading(3.0, count=3)],
    ids=["mild", "even", "towards-the-input", "converged", "shallow"],
)
def test_vanishing_healthy_depth_profiles_are_no_hit(norms):
    """Small everywhere is converged; three modules are no depth; growing towards the input is another matter."""
    assert hits(Vanishing(), [measurement(norms, loss=1.0)] * 100) == []


def test_vanishing_symptom_with_a_break_starts_again():
    """It must last without one."""
    steps = ([measurement(fading(1.0), loss=1.0)] * 19 + [measurement(fading(0.0), loss=1.0)]) * 5
    assert hits(Vanishing(), steps) == []


def test_vanishing_dead_module_is_named():
    """Exactly zero while others are not; those before it are counted."""
    detector = Vanishing(warmup_steps=0, persistence=2)
    detector.observe(measurement([1.0, 1.0, 1.0, 1.0], loss=1.0))
    step = measurement([0.0, 0.0, 1.0, 1.0], loss=1.0)
    assert detector.observe(step) is None
    message = detector.observe(step).message
    assert "`layers.1` and 1 module before it has been exactly zero for 2 steps" in message


def test_vanishing_frozen_module_is_no_hit():
    """No gradient at all is not a gradient of zero."""
    has_grad = np.array([False, True, True, True])
    step = Measurement(layers(4), np.array([0.0, 1.0, 1.0, 1.0]), has_grad, math.sqrt(3))
    assert hits(Vanishing(), [step] * 100) == []


@pytest.mark.parametrize(("loss", "fires"), [(1.0, True), (None, True), (0.0, False)])
def test_vanishing_floor_fires_unless_the_loss_is_zero(loss, fires):
    """A loss of zero has no gradient by right."""
    detector = Vanishing(warmup_steps=0, persistence=1)
    verdict = detector.observe(measurement([1e-14, 1e-14], loss=loss))
    assert (verdict is not None) == fires
    if fires:
        assert verdict.message.endswith("has been below 1e-12 for 1 step")


def test_vanishing_biases_and_gains_do_not_count():
    """Only matrices and kernels are compared by depth."""
    names = [f"layers.{index}.{kind}" for index in range(6) for kind in ("weight", "bias")]
    layout = Layout.of(names, [(8, 8), (8,)] * 6)
    norms = np.array([value for index in range(6) for value in (1.0, 10.0 ** (index - 6))])
    step = Measurement(layout, norms, np.ones(12, dtype=np.bool_), float(np.linalg.norm(norms)))
    assert hits(Vanishing(), [step] * 100) == []


@examples
@given(st.integers(-8, 8), st.sampled_from([0.1, 0.35, 1.0]))
def test_vanishing_loss_times_a_constant_changes_no_verdict(exponent, slope):
    """The comparison is between modules."""
    sizes = (1.0, 10.0**exponent)
    found = [hits(Vanishing(), [measurement(fading(slope, size=size), loss=1.0)] * 40) for size in sizes]
    if min(sizes) * 1e-9 > 1e-12 or slope == 0.1:
        assert found[0] == found[1]


def test_vanishing_steps_without_gradients_count_for_nothing():
    """Neither as a symptom nor as a break."""
    fade = [measurement(fading(1.0), loss=1.0)]
    steps = fade * 25 + [no_gradients()] * 10 + fade * 10
    assert hits(Vanishing(), steps) == [40, 41, 42, 43, 44]


def test_explosion_spike_of_one_parameter_warns_whatever_the_action():
    """The global norm hides it: 250 times the usual of one, four times that of all."""
    detector = Explosion("skip")
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.1, (60, 3))) * (1.0, 1.0, 0.02)
    assert hits(detector, [measurement(row.tolist()) for row in noise]) == []
    spiked = measurement([1.0, 1.0, 5.0])
    assert spiked.global_norm < detector.limit()
    verdict = detector.observe(spiked)
    assert verdict.is_advisory
    assert verdict.parameters[0].name == "layers.2.weight"
    assert "times its usual 0.02" in verdict.message
    assert Explosion("skip", min_share=None).observe(spiked) is None


def test_explosion_parameter_with_a_small_share_is_no_hit():
    """What carries one percent of the norm harms nobody."""
    detector = Explosion()
    assert hits(detector, [measurement([1.0, 1e-4])] * 60 + [measurement([1.0, 0.01])]) == []


def test_explosion_parameter_at_a_new_level_is_learned():
    """After twenty hits it is taken for normal; later spikes are found again."""
    before, after = [10.0, 10.0, 0.2], [10.0, 10.0, 15.0]
    found = hits(Explosion(), [measurement(before)] * 60 + [measurement(after)] * 100 + [measurement([10.0, 10.0, 100.0])])
    assert found == [*range(60, 80), 160]


def test_explosion_growth_of_one_parameter_is_found_within_fifteen_steps():
    """A third more at each step."""
    grown = [measurement([1.0, 1.0, 0.3 * 1.33 ** max(step - 60, 0)]) for step in range(80)]
    assert 60 < hits(Explosion(), grown)[0] <= 75


def test_verdict_that_is_advisory_neither_skips_nor_stops():
    """Nor does it where it is the last of many in a row."""
    streak = Streak(hits=4)
    advice = Verdict("explosion", 2.0, 1.0, "too much", "less", is_advisory=True)
    _, action, _ = streak.hit(9, Explosion("raise", stop_after=5).policy, advice)
    assert action is Action.WARN


def test_explosion_parameter_that_rises_with_all_others_is_no_hit():
    """A network that starts to learn late: every norm climbs thirtyfold, one of them twice as far."""
    climb = [1.12 ** min(step, 30) for step in range(60)]
    steps = [measurement([1.0, 1.0, 0.3], loss=1.0)] * 60
    steps += [measurement([size, size, 0.3 * size**1.2], loss=1.0 - 0.01 * at) for at, size in enumerate(climb)]
    assert max(climb) > 25.0
    assert hits(Explosion(), steps) == []


NOISES = [0.1, 0.4, 0.7, 1.0, 1.5]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seed", range(3))
def test_explosion_spike_of_thirty_times_is_found_however_noisy_the_history(noise, seed):
    """No history puts the limit out of reach."""
    norms = np.exp(np.random.default_rng(seed).normal(0.0, noise, 400))
    detector = Explosion()
    for at, norm in enumerate(norms):
        if at >= 64:
            assert detector.limit() < 30.0 * np.median(norms[at - 64 : at]) * 1.2  # flagged norms are no history
        judge(detector, measurement([norm], loss=1.0))


@pytest.mark.parametrize("noise", NOISES[:3])
def test_explosion_limit_follows_what_a_noisy_history_does_often(noise):
    """At most a few of 2,000 healthy steps are flagged."""
    norms = np.exp(np.random.default_rng(1).normal(0.0, noise, 2000))
    assert len(hits(Explosion(), [measurement([norm], loss=1.0) for norm in norms])) <= 2


def growing(rate, noise=0.2, *, loss_noise=0.1, slope=0.0, seed=0, steps=200, onset=100):
    """A norm that grows by this factor a step from step 100 on, and a loss around 1 that moves by `slope` a step."""
    rng = np.random.default_rng(seed)
    for step in range(steps):
        after = max(step - onset, 0)
        norm = rate**after * math.exp(rng.normal(0.0, noise))
        yield measurement([norm, norm], loss=1.0 + slope * after + rng.normal(0.0, loss_noise))


@pytest.mark.parametrize("noise", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_explosion_growth_with_a_flat_loss_is_found_within_twenty_steps(noise, seed):
    """A quarter more at each step, 86 times in all, whatever the loss looks like."""
    assert 100 <= hits(Explosion(), growing(1.25, noise, seed=seed))[0] <= 120


@pytest.mark.parametrize("loss", [1.0, None])
def test_explosion_slow_growth_without_a_falling_loss_warns(loss):
    """Seven percent a step, 70 times in 64; no single step stands out."""
    detector, told = Explosion("skip"), []
    for step in growing(1.07, noise=0.3, steps=190):
        verdict = judge(detector, replace(step, loss=loss and step.loss))
        told += [verdict] if verdict is not None else []
    assert told[0].is_advisory
    assert "keeps growing" in told[0].message
    assert ("the loss is not known" in told[0].message) == (loss is None)
    assert told[0].value > told[0].limit


def test_explosion_growth_while_the_loss_falls_is_no_hit():
    """A plateau is left: a thousandfold in 64 steps, while the loss reaches new lows."""
    steps = growing(1.115, noise=0.2, loss_noise=0.02, slope=-0.012, steps=164)
    assert hits(Explosion(), steps) == []


def test_explosion_parameter_that_was_a_rounding_error_is_no_hit():
    """The bias of an attention's keys has no gradient but rounding; one day it does."""
    usual = [measurement([1.0, 1e-7])] * 100
    assert hits(Explosion(), [*usual, measurement([1.0, 2.5])]) == []
    assert hits(Explosion(), [measurement([1.0, 1e-2])] * 100 + [measurement([1.0, 2.5])]) == [100]


def test_explosion_parameter_that_leaps_now_and_then_is_no_hit():
    """Embeddings of positions do, in health; only what stays outside, or is far above all leaps, is found."""
    calm, leap = measurement([1.0, 0.02]), measurement([1.0, 1.5])
    detector = Explosion()
    for step in ([calm] * 20 + [measurement([1.0, 0.5])]) * 5 + [leap]:
        judged = judge(detector, step)
    assert judged is None
    assert hits(detector, [leap, leap, leap])[0] <= 2


def test_vanishing_branch_that_is_not_in_use_is_one_note():
    """Zero since the first step, at most half of the modules: no alert, however long it lasts."""
    detector = Vanishing()
    found = [judge(detector, measurement([1.0, 0.0, 1.0, 1.0], loss=1.0)) for _ in range(300)]
    assert [at for at, verdict in enumerate(found) if verdict is not None] == [19]
    assert found[19].is_note
    assert "`layers.1` has been exactly zero since the first of 20 steps" in found[19].message


def test_vanishing_branch_that_lived_and_died_is_an_alert():
    """Also where it was noted before."""
    unused, used = measurement([1.0, 0.0, 1.0, 1.0], loss=1.0), measurement([1.0, 1.0, 1.0, 1.0], loss=1.0)
    detector = Vanishing()
    assert hits(detector, [unused] * 30 + [used] * 60 + [unused] * 25) == [19, 109, 110, 111, 112, 113, 114]
    assert not detector.observe(unused).is_note


def test_vanishing_module_that_few_batches_use_rests_and_may_die_all_the_same():
    """One step in twenty has a gradient, as of an embedding of something rare; then none has, and then it takes longer."""
    uses = np.random.default_rng(0).random(1000) < 0.05
    steps = [measurement([1.0, float(used), 1.0, 1.0], loss=1.0) for used in uses]
    detector = Vanishing()
    found = hits(detector, steps)
    assert found in ([], [19])  # a note where the first 20 steps don't use it
    died = hits(detector, [measurement([1.0, 0.0, 1.0, 1.0], loss=1.0)] * 600)
    assert 150 < died[0] < 500


def sinking(loss_after):
    """A norm that falls to a ten-millionth, and a loss that then is what it is."""
    random = np.random.default_rng(0)
    norms = [1.0] * 40 + [1e-7] * 100
    losses = [-0.7] * 40 + [loss_after] * 100
    noise = 1.0 + 0.05 * random.standard_normal((2, 140))
    return [
        measurement([norm * one] * 4, loss=loss * other)
        for norm, loss, one, other in zip(norms, losses, *noise.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("loss", "is_found"), [(-1e-8, True), (-0.7, True), (-0.9, False)])
def test_vanishing_norm_that_sinks_is_a_finding_unless_the_loss_falls_with_it(loss, is_found):
    """A generator whose discriminator wins has a loss that rises to zero; a training that converges one that falls."""
    steps = sinking(loss)
    detector = Vanishing()
    verdicts = [judge(detector, step) for step in steps]
    assert [at for at, verdict in enumerate(verdicts) if verdict is not None] == (list(range(79, 140)) if is_found else [])
    if is_found:
        assert "has fallen from 1.98 to 2.02e-07" in verdicts[-1].message
        assert verdicts[-1].value < verdicts[-1].limit


def test_explosion_usual_norm_in_a_message_is_the_one_that_the_limit_counts_from():
    """Where a norm rises fast, the last few steps are above the limit of the whole window."""
    detector = Explosion()
    verdicts = [judge(detector, measurement([1.2**step], loss=1.0)) for step in range(65)]
    assert verdicts[:64] == [None] * 64
    usual = float(verdicts[64].message.partition("its usual ")[2].partition(" ")[0])
    assert usual < verdicts[64].limit < verdicts[64].value


def test_explosion_usual_norm_in_a_message_is_the_recent_one_where_no_ceiling_counts():
    """The limit is six times it, whichever way that is rounded."""
    for seed in range(30):
        random, detector = np.random.default_rng(seed), Explosion()
        for step in range(100):
            judge(detector, measurement([math.exp(random.normal(0.003 * step, 0.15))]))
        verdict = detector.observe(measurement([1e6]))
        usual = float(verdict.message.partition("its usual ")[2].partition(" ")[0])
        assert verdict.limit / usual == pytest.approx(6.0, rel=0.01)


def test_explosion_rate_that_goes_up_and_down_is_no_growth():
    """The norm rises ninefold within 40 steps, but no higher than before."""
    random = np.random.default_rng(1)
    waves = 3.0 ** np.sin(2.0 * np.pi * np.arange(600) / 80.0)
    noise = np.exp(0.2 * random.standard_normal(600))
    steps = [
        measurement([norm], loss=float(loss)) for norm, loss in zip(waves * noise, 1.0 + 0.1 * np.log(waves), strict=True)
    ]
    assert hits(Explosion(), steps) == []


def test_vanishing_most_of_the_network_without_gradient_is_an_alert():
    """As where all weights begin at zero."""
    verdicts = [
        judge(detector, measurement([0.0, 0.0, 0.0, 1.0], loss=1.0)) for detector in [Vanishing()] for _ in range(25)
    ]
    assert [verdict is not None for verdict in verdicts] == [False] * 19 + [True] * 6
    assert not verdicts[-1].is_note


def test_vanishing_norm_of_zero_for_good_is_reported_again_and_again():
    """Nothing is learned: fp16 has underflowed. Four lines within 200 steps, eight within 1,500."""
    detector, streak, told = Vanishing(), Streak(), []
    for step in range(1500):
        verdict = judge(detector, measurement([0.0, 0.0], loss=3.0) if step >= 100 else measurement([1.0, 1.0], loss=3.0))
        if verdict is not None:
            streak, _, is_reported = streak.hit(step, detector.policy, verdict)
            told += [step] * is_reported
    assert told == [119, 144, 169, 219, 319, 519, 919]


def test_overflow_that_lasts_is_dire():
    """Each step is lost."""
    bad = measurement([math.nan], loss=1.0, loss_scale=0.5)
    assert Overflow().observe(bad).is_dire


def test_explosion_state_of_an_earlier_version_is_taken():
    """It knew nothing of parameters outside their history."""
    detector = Explosion()
    for step in scalar([1.0] * 70):
        judge(detector, step)
    state = detector.state_dict()
    for key in ("outside", "num_found"):
        del state["parameters"][key]
    resumed = Explosion()
    resumed.load_state_dict({**state, "num_advised": 3})
    assert resumed.limit() == detector.limit()
    old = Vanishing()
    old.load_state_dict({"num_seen": 40, "lasting": {"dead:layers.1": 30}})
    assert hits(old, [measurement([1.0, 0.0, 1.0, 1.0], loss=1.0)]) == [0]


def test_explosion_new_level_after_growth_starts_afresh():
    """Growth that has just been seen is forgotten with the history that showed it."""
    detector = Explosion(adapt_after=2)
    for step in growing(1.07, noise=0.05, steps=400):
        judge(detector, step)
        if detector.state_dict()["trend"]["grows"]:
            break
    level = 1e6 * step.global_norm
    assert hits(detector, [measurement([level], loss=1.0)] * 5) == [0, 1]


def test_explosion_spike_of_one_parameter_after_steps_without_any_gradient_is_found():
    """A share of nothing is no figure, and no warning either."""
    steps = [measurement([1.0, 0.1])] * 40 + [measurement([0.0, 0.0])] * 5 + [measurement([1.0, 0.1])] * 10
    assert hits(Explosion(), [*steps, measurement([1.0, 4.0])]) == [55]

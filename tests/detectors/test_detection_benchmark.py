"""The benchmark of the detectors: that its labels, its split and its scores are what it says they are."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from builders import measurement

from benchmarks.detection import before_loss, public, rules
from benchmarks.detection import recording as recordings
from benchmarks.detection.recording import Recording, recorded, run
from benchmarks.detection.score import score
from benchmarks.detection.split import HALVES
from benchmarks.detection.trainings import KINDS, Kind
from benchmarks.detection.trainings.architectures import ARCHITECTURES
from benchmarks.detection.trainings.architectures import STEPS as ARCHITECTURE_STEPS

HEALTHY = Kind("calm", KINDS["mlp_adam"].build)
SICK = Kind("spiked", KINDS["mlp_adam"].build, "a fault", ("explosion",), onset=30)


def made(kind, norms):
    """A recording of a model with one module."""
    return Recording(kind, 0, tuple(measurement([float(norm)], loss=1.0) for norm in norms), 0.0)


def test_split_every_kind_is_in_one_half():
    """And each holds healthy and sick ones, with every fault."""
    assert sum(map(len, HALVES.values())) == len(KINDS)
    assert set(KINDS) == set().union(*HALVES.values())
    faults = [{KINDS[name].fault for name in half} for half in HALVES.values()]
    assert faults[0] == faults[1] == faults[2]


def test_kinds_are_at_least_sixteen_of_each():
    """Every sick one says which detectors must find it."""
    healthy = [kind for kind in KINDS.values() if kind.is_healthy]
    sick = [kind for kind in KINDS.values() if not kind.is_healthy]
    assert min(len(healthy), len(sick)) >= 16
    assert all(set(kind.must_find) <= {"nonfinite", "explosion", "vanishing", "overflow", "update_ratio"} for kind in sick)
    assert all(kind.must_find for kind in sick)


def test_score_alarm_after_the_onset_is_recall_and_before_it_is_false():
    """Delay counts from the onset."""
    calm, spiked = [1.0] * 60, [1.0] * 32 + [100.0] + [1.0] * 27
    found = score(rules.gradguard(), [made(HEALTHY, calm), made(SICK, spiked)])
    assert (found.recall, found.delay_of("a fault"), found.false_alarms) == (1.0, 2, 0)
    assert found.healthy_steps == 60 + 30
    early = score(rules.gradguard(), [made(SICK, [1.0] * 20 + [100.0] + [1.0] * 39)])
    assert (early.recall, early.false_alarms) == (0.0, 1)
    assert early.missed == ["spiked (seed 0)"]


def test_score_finding_of_another_kind_does_not_count():
    """An explosion is not found by whoever else fires."""
    spiked = [1.0] * 32 + [math.nan] + [1.0] * 27
    assert score(rules.gradguard(), [made(SICK, spiked)]).recall == 0.0
    assert score(rules.gradguard(), [made(SICK, spiked)], any_kind=True).recall == 1.0


@pytest.mark.parametrize("rule", [rules.gradguard(), *rules.PEERS.values()], ids=["ours", *rules.PEERS])
def test_rule_on_steady_norms_flags_nothing(rule):
    """Noise of five percent."""
    norms = np.exp(np.random.default_rng(0).normal(0.0, 0.05, 200))
    fired = rule(made(HEALTHY, norms))
    assert len(fired) == 200
    assert sum(map(bool, fired)) <= (2 if rule is rules.zclip else 0)


def test_olmo_after_one_nan_flags_its_whole_window():
    """As seen in the original."""
    fired = rules.olmo(made(HEALTHY, [1.0, 1.1] * 50 + [math.nan] + [1.0, 1.1] * 100))
    assert sum(map(bool, fired)) == 129


@pytest.mark.parametrize("name", ["mlp_adam", "nan_element", "fp16_backward", "exploding_rnn"])
def test_training_of_few_steps_runs_and_is_seeded(name):
    """The same figures twice."""
    first, second = (run(KINDS[name], 0, steps=3) for _ in range(2))
    assert first.losses == second.losses
    assert len(first.measurements) == 3


def test_recording_through_the_cache_is_what_was_measured(tmp_path, monkeypatch):
    """NaN, who is damaged, and where the loss was."""
    monkeypatch.setattr(recordings, "CACHE", tmp_path)
    read, measured = recorded(KINDS["nan_element"], 1, 160), run(KINDS["nan_element"], 1, 160)
    for one, other in zip(read.measurements, measured.measurements, strict=True):
        assert np.array_equal(one.norms, other.norms, equal_nan=True)
        assert repr((one.loss, one.damage, one.nonfinite)) == repr((other.loss, other.damage, other.nonfinite))
    assert not read.measurements[150].is_finite


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_detectors_at_default_settings_raise_no_alarm_on_healthy_kinds():
    """One seed of each, all of them run afresh or from the cache."""
    healthy = [recorded(kind, 0) for kind in KINDS.values() if kind.is_healthy]
    # One sample a batch makes steps of more than 25 times the usual norm; docs/accuracy.md says so.
    assert score(rules.gradguard(), healthy).alarmed.keys() <= {"single_samples (seed 0)"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_detectors_at_default_settings_raise_no_alarm_on_architectures(name):
    """A few of the twelve, run afresh or from the cache."""
    found = score(rules.gradguard(), [recorded(ARCHITECTURES[name], 0, ARCHITECTURE_STEPS)])
    assert found.alarmed == {}


def test_published_histories_each_have_a_source_and_a_licence():
    """What others have published is named."""
    with (public.FOLDER / "index.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {path.name for path in public.FOLDER.glob("*.csv.gz")}
    assert all(row["source"].startswith("github.com/") and row["licence"] in {"MIT", "Apache-2.0"} for row in rows)


@pytest.mark.parametrize("name", ["translation_noisy", "vit_lora_every500", "nli_every10", "self_play_rl"])
def test_published_history_spike_of_thirty_times_is_found(name):
    """In the noisiest, too; by the detector itself."""
    history = next(each for each in public.histories() if each.name == name)
    assert public.found(history, public.replayed(history).limits, 30.0) >= 0.99


def test_score_of_a_note_in_the_log_is_found_and_no_alarm():
    """A branch without gradient since the first step is told of."""

    def rule(recording):
        return [frozenset({"logged explosion"} if step == 40 else ()) for step in range(len(recording.measurements))]

    found = score(rule, [made(HEALTHY, [1.0] * 60), made(SICK, [1.0] * 60)])
    assert (found.false_alarms, found.alarmed, found.recall, found.noted) == (0, {}, 1.0, ["spiked (seed 0)"])


def test_foresight_of_a_spike_counts_steps_from_the_onset():
    """The loss leaves its range, and a candidate is a figure a step."""
    assert before_loss.loss_rises([1.0] * 40 + [5.0] * 20, 40) == 3  # four of eight
    series = before_loss.Series.of(made(SICK, [1.0] * 40 + [50.0] * 10))
    figure = before_loss.against_second_moment(0.999, max)(series)
    assert figure[:40] == pytest.approx(1.0)
    assert figure[40] > 5.0

"""States of every release load, and damaged ones cost no more than what is damaged."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from builders import examples, mlp, through_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard import AGC, AdaGC, Alert, AutoClip, Detector, Explosion, GradGuard, Guard, UpdateRatio, ZClip
from lightning_gradguard.errors import GuardWarning
from lightning_gradguard.files.json_lines import Reader
from lightning_gradguard.files.torch_files import load_plain
from lightning_gradguard.forensics.bundle import Bundle
from lightning_gradguard.recovery.quarantine import QuarantineFile
from lightning_gradguard.saved_state import mended_alerts
from lightning_gradguard.trainer.history import History

STATES = Path(__file__).parent / "states"
RELEASES = sorted(path.name for path in STATES.iterdir() if (path / "states.pt").exists())
RATIOS = {"before_0_1_0": 5.0}
"""Defaults of `Explosion` that have changed since."""
SETTINGS = {
    "default": {},
    "norm": {"clip": 1.0, "explosion": "skip"},
    "agc": {"clip": AGC()},
    "autoclip": {"clip": AutoClip()},
    "zclip": {"clip": ZClip()},
    "adagc": {"clip": AdaGC(warmup_steps=8)},
    "grouped": {"clip": {"net.0.*": AutoClip(), "*": 1.0}},
    "update_ratio": {"detectors": [UpdateRatio()]},
    "max_norm": {"explosion": Explosion("warn", max_norm=100.0)},
    "quarantine": {},
    "rollback": {},
}


def small_guard(**settings):
    """Of a network like the one whose states are kept."""
    net = torch.nn.ModuleDict({"net": mlp(4, 8, 1)})
    return Guard(net.named_parameters(), **settings), net


def trained(num_steps=40, **settings):
    """A guard that has seen some steps, and its state as a checkpoint holds it."""
    guard, net = small_guard(**settings)
    for _ in range(num_steps):
        net.zero_grad()
        net["net"](torch.randn(4, 4)).square().mean().backward()
        guard.step()
    return guard, through_checkpoint(guard.state_dict())


def with_ratio(ratio, *, explosion="warn", **settings):
    """Settings under which `Explosion` had another default."""
    max_norm = 100.0 if isinstance(explosion, Explosion) else None
    action = "warn" if isinstance(explosion, Explosion) else explosion
    return {**settings, "explosion": Explosion(action, ratio=ratio, max_norm=max_norm)}


def limit_of(guard):
    """The norm that the next step may not exceed."""
    return min(detector.limit() for detector in guard._pipeline._judge._detectors)


def loaded(state, **settings):
    """A guard that goes on from a state, and what was said."""
    guard, net = small_guard(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guard.load_state_dict(state)
    net["net"](torch.randn(4, 4)).square().mean().backward()
    guard.step()
    return guard, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_state_of_a_release_loads_and_decides_alike(release, name):
    """Without a warning; the next limit is the one that the release had."""
    saved = torch.load(STATES / release / "states.pt", weights_only=True)[name]
    history = History.from_state(saved["state"])
    guard, _ = small_guard(**with_ratio(RATIOS.get(release, 6.0), **SETTINGS[name]))
    guard.load_state_dict(history.guards[0])
    assert limit_of(guard) == saved["limit"]
    assert guard.totals.num_skipped == 1
    assert (history.rollbacks.num_rollbacks, bool(history.left_out)) == (name == "rollback", name == "quarantine")


@pytest.mark.parametrize("release", RELEASES)
def test_files_of_a_release_are_read(release):
    """Alerts, quarantine, bundle and snapshot."""
    folder = STATES / release
    reader = Reader(folder / "alerts.jsonl", Alert.from_dict)
    (alert,) = reader.read()
    assert (alert.kind, alert.culprit.op, reader.left_out.count) == ("nonfinite", "mul", 0)
    samples, left_out = QuarantineFile(folder / "quarantine.jsonl").read()
    assert (samples, left_out.count) == ({80, 81, 82, 83}, 0)
    bundle = Bundle.load(folder / "nonfinite-step20.bundle.pt")
    assert (bundle.alert["step"], len(bundle.batches)) == (20, 1)
    assert load_plain(folder / "snapshot.ckpt")["callbacks"]["GradGuard"]["guards"]


def test_state_that_was_just_saved_loads_without_a_word():
    """By every configuration; and what is saved again is the same."""
    for settings in SETTINGS.values():
        _, state = trained(**settings)
        guard, _ = small_guard(**settings)
        guard.load_state_dict(copy.deepcopy(state))
        assert json.dumps(guard.state_dict()) == json.dumps(state)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state["totals"].update(zzz=1), "unknown count `zzz` is ignored"),
        (lambda state: state["totals"].pop("num_skipped"), "count `num_skipped` is missing"),
        (lambda state: state["totals"].update(num_steps="many"), "count `num_steps` is damaged"),
        (lambda state: state.update(totals=None), "`totals` is damaged"),
        (lambda state: state.update(zzz=1), "unknown field `zzz` is ignored"),
        (lambda state: state.pop("judge"), "`judge` is missing"),
        (lambda state: state.update(judge={"detectors": 5}), "counts of steps are damaged"),
        (lambda state: state["judge"]["detectors"].update(explosion=[]), "state of detector `explosion` is damaged"),
        (lambda state: state["judge"]["detectors"]["explosion"]["state"].pop("baseline"), "KeyError: 'baseline'"),
        (lambda state: state["judge"]["detectors"]["explosion"].update(state={"baseline": 1}), "`explosion` is damaged"),
        (lambda state: state["judge"]["detectors"]["explosion"].update(type="Other"), "holds Other for the detector"),
        (lambda state: state["judge"]["detectors"]["explosion"].update(streak=[1]), "streak of detector `explosion`"),
        (lambda state: state["judge"]["detectors"]["explosion"].pop("streak"), "streak of detector `explosion`"),
        (lambda state: state["judge"]["detectors"]["vanishing"]["state"].update(lasting=[1]), "`vanishing` is damaged"),
        (lambda state: state["clipper"]["state"].update(values=["a", 1.0]), "history of the clipper is damaged"),
        (lambda state: state["clipper"].pop("state"), "`clipper` is damaged"),
        (lambda state: state.update(updates={"ratios": [1, "a"]}), "`updates` is damaged"),
        (lambda state: state.update(version=99), "later version"),
    ],
)
def test_damaged_part_costs_that_part(damage, said):
    """It is named, all else is there, and the next step is decided."""
    _, state = trained(clip=AutoClip())
    damage(state)
    guard, messages = loaded(state, clip=AutoClip())
    assert any(said in message for message in messages), messages
    kept = "totals" not in said and "num_steps" not in said and "`totals`" not in said
    assert guard.num_steps == (41 if kept else 1)


def test_state_of_what_is_off_by_now_is_passed_over():
    """The history of parameters, where these are not looked at alone any more."""
    _, state = trained()
    guard, messages = loaded(state, explosion=Explosion(min_share=None))
    assert messages == []
    assert guard.num_steps == 41


def test_nan_among_the_saved_values_never_enters_a_baseline():
    """The detector starts afresh; the others keep what they know."""
    _, state = trained()
    state["judge"]["detectors"]["explosion"]["state"]["baseline"]["values"][3] = math.nan
    guard, messages = loaded(state)
    assert ["it holds NaN" in message for message in messages] == [True]
    assert math.isinf(limit_of(guard))
    assert guard.state_dict()["judge"]["detectors"]["vanishing"]["state"]["num_seen"] == 41


@pytest.mark.parametrize("state", [None, "x", 5, [], {}, {"judge": {}}, {"version": "new"}])
def test_state_that_is_none_starts_afresh(state):
    """With a warning, and without an error."""
    guard, messages = loaded(state)
    assert messages
    assert guard.num_steps == 1


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("x", "all of it is damaged"),
        ({}, "`guards` is missing"),
        ({"guards": None}, "`guards` is damaged"),
        ({"guards": [], "num_replays": -1}, "`num_replays` is damaged"),
        ({"guards": [], "recovery": {"foo": 1}}, "unknown field `foo`"),
        ({"guards": [], "recovery": {"num_rollbacks": "a"}}, "`num_rollbacks` is damaged"),
        ({"guards": [], "quarantine": ["a"]}, "`quarantine` is damaged"),
        ({"guards": [], **{f"field {number}": 1 for number in range(9)}}, "and 4 more"),
    ],
)
def test_damaged_state_of_the_callback_costs_what_is_damaged(state, said):
    """What Lightning hands to `load_state_dict`."""
    with pytest.warns(GuardWarning, match=said):
        GradGuard().load_state_dict(state)


def test_alerts_that_are_none_are_passed_over():
    """The others are there again."""
    good = {"step": 1, "kind": "nonfinite", "action": "skip", "message": "m"}
    assert [alert.step for alert in mended_alerts([5, good, {"step": 2}])] == [1]
    assert mended_alerts("x") == mended_alerts(None) == []


def test_detector_of_the_users_own_is_not_tried_out():
    """Nobody knows what it does with a step that is none."""

    class Own(Detector):
        name = "own"

        def __init__(self):
            super().__init__("warn")
            self.seen = 0

        def observe(self, measurement):
            self.seen += 1

        def state_dict(self):
            return {"seen": self.seen, "spread": math.nan}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    _, state = trained(5, detectors=[Own()])
    guard, messages = loaded(copy.deepcopy(state), detectors=[Own()])
    assert messages == []
    assert guard.state_dict()["judge"]["detectors"]["own"]["state"]["seen"] == 6
    del state["judge"]["detectors"]["own"]["state"]["seen"]
    assert "`own` is damaged (KeyError: 'seen')" in loaded(state, detectors=[Own()])[1][0]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places_in(value, path=()):
    """Every place in a tree."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places_in(entry, (*path, key))


@examples
@given(st.data())
def test_state_with_any_junk_at_any_place_loads(data):
    """And the guard decides the next step."""
    _, state = trained(20, clip=ZClip(), detectors=[UpdateRatio()])
    path = data.draw(st.sampled_from([place for place in places_in(state) if place]))
    target = state
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = data.draw(JUNK)
    guard, _ = loaded(state, clip=ZClip(), detectors=[UpdateRatio()])
    assert guard.last is not None

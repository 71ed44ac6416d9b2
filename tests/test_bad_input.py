"""Bad input gets a `ValueError` that names parameter, constraint, value and remedy."""

from __future__ import annotations

import math

import pytest
from builders import mlp

from lightning_gradguard import (
    Action,
    ClipNorm,
    ClipValue,
    Detector,
    Explosion,
    GradGuard,
    Guard,
    NonFinite,
    Rollback,
    Vanishing,
)
from lightning_gradguard.detectors.overflow import Overflow
from lightning_gradguard.settings import Settings


def guard(**settings):
    """A guard of a small network."""
    return Guard(mlp(2, 1).named_parameters(), **settings)


DEFAULTS = {
    "clip": None,
    "nonfinite": "skip",
    "explosion": "warn",
    "vanishing": "warn",
    "overflow": "warn",
    "detectors": (),
    "include": None,
    "exclude": (),
    "sinks": (),
    "histogram_every_n_steps": 100,
}


class Nameless(Detector):
    """A detector that forgot its name."""

    def observe(self, measurement):
        """Nothing."""


class Named(Nameless):
    """A detector with a name."""

    name = "named"


class Taken(Nameless):
    """A detector with a built-in one's name."""

    name = "explosion"


class NumberedName(Nameless):
    """A detector with a name that is no text."""

    name = 3


class NoPolicy(Named):
    """A detector that forgot to call its base."""

    def __init__(self):
        """Nothing."""


class Half:
    """An object that is nearly a sink."""

    def write(self, record):
        """Nothing."""


def own(detector):
    """A guard with a detector of the user's own."""
    return lambda: guard(detectors=[detector])


# What is called, the parameter, its constraint, the value as shown, and the remedy.
CASES = {
    "clip-negative": (lambda: guard(clip=-1.0), "clip", "> 0 and finite", "-1.0", "pass `clip=None`"),
    "clip-zero": (lambda: guard(clip=0), "clip", "> 0", "0", "pass `clip=None`"),
    "clip-nan": (lambda: guard(clip=math.nan), "clip", "> 0", "nan", "pass `clip=None`"),
    "clip-inf": (lambda: guard(clip=math.inf), "clip", "finite", "inf", "pass `clip=None`"),
    "clip-text": (lambda: guard(clip="1"), "clip", "a number", "'1'", "`clip=1.0`"),
    "clip-bool": (lambda: guard(clip=True), "clip", "a number", "True", "`clip=1.0`"),
    "clip-class": (lambda: guard(clip=ClipNorm), "clip", "a Clipper", "<class", "ClipValue(0.5)"),
    "clip-list": (lambda: guard(clip=[1.0]), "clip", "a number", "[1.0]", "`clip=1.0`"),
    "max_norm": (lambda: ClipNorm(-1), "max_norm", "> 0", "-1", "pass `clip=None`"),
    "max_norm-none": (lambda: ClipNorm(None), "max_norm", "a number", "None", "pass `clip=None`"),
    "norm_type": (lambda: ClipNorm(1.0, 0), "norm_type", "> 0", "0", "2.0"),
    "norm_type-nan": (lambda: ClipNorm(1.0, math.nan), "norm_type", "> 0", "nan", "2.0"),
    "norm_type-text": (lambda: ClipNorm(1.0, "inf"), "norm_type", "a number", "'inf'", "2.0"),
    "clip_value": (lambda: ClipValue(0.0), "clip_value", "> 0", "0.0", "pass `clip=None`"),
    "action": (lambda: NonFinite("explode"), "action", "one of 'log', 'warn'", "'explode'", "pass None"),
    "action-none": (lambda: Explosion(None), "action", "one of", "None", "pass None"),
    "action-list": (lambda: Explosion(["skip"]), "action", "one of", "['skip']", "pass None"),
    "nonfinite": (lambda: guard(nonfinite="wran"), "nonfinite", "one of", "'wran'", "pass None"),
    "rollback-without-detector": (
        lambda: GradGuard(rollback=Rollback()),
        "rollback",
        "a detector whose",
        "none",
        "nonfinite='rollback'",
    ),
    "explosion-bool": (lambda: guard(explosion=False), "explosion", "an action's name", "False", '`explosion="warn"`'),
    "vanishing-other": (lambda: guard(vanishing=NonFinite()), "vanishing", "Vanishing(...)", "<", 'Vanishing("skip"'),
    "overflow-number": (lambda: guard(overflow=1), "overflow", "Overflow(...) or None", "1", '`overflow="warn"`'),
    "patience": (lambda: NonFinite(patience=0), "patience", "an integer >= 1", "0", "Pass 1"),
    "patience-float": (lambda: NonFinite(patience=2.0), "patience", "an integer", "2.0", "Pass 1"),
    "patience-bool": (lambda: NonFinite(patience=True), "patience", "an integer", "True", "Pass 1"),
    "cooldown": (lambda: Explosion(cooldown=-1), "cooldown", "an integer >= 0", "-1", "Pass 0"),
    "stop_after": (lambda: NonFinite(stop_after=0), "stop_after", "an integer >= 1", "0", "Pass None"),
    "explosion-max_norm": (lambda: Explosion(max_norm=-5), "max_norm", "> 0", "-5", "pass None"),
    "explosion-max_norm-nan": (lambda: Explosion(max_norm=math.nan), "max_norm", "> 0", "nan", "pass None"),
    "ratio": (lambda: Explosion(ratio=1.0), "ratio", "> 1", "1.0", "pass None"),
    "no-limit": (lambda: Explosion(ratio=None), "max_norm", "given", "None", "explosion=None"),
    "z": (lambda: Explosion(z=0), "z", "> 0", "0", "8.0"),
    "window": (lambda: Explosion(window=1), "window", ">= 2", "1", "64"),
    "warmup": (lambda: Explosion(warmup_steps=1), "warmup_steps", ">= 2", "1", "16"),
    "warmup-window": (lambda: Explosion(warmup_steps=65), "warmup_steps", "<= `window`", "65 > 64", "window longer"),
    "adapt_after": (lambda: Explosion(adapt_after=1), "adapt_after", ">= 2", "1", "20"),
    "min_ratio": (lambda: Vanishing(min_ratio=2.0), "min_ratio", "> 0 and <= 1", "2.0", "1e-3"),
    "slope": (lambda: Vanishing(slope=-0.1), "slope", "> 0", "-0.1", "0.3"),
    "min_norm": (lambda: Vanishing(min_norm=0.0), "min_norm", "> 0", "0.0", "1e-12"),
    "persistence": (lambda: Vanishing(persistence=0), "persistence", ">= 1", "0", "20"),
    "vanishing-warmup": (lambda: Vanishing(warmup_steps=-1), "warmup_steps", ">= 0", "-1", "30"),
    "max_in_a_row": (lambda: Overflow(max_in_a_row=0), "max_in_a_row", ">= 1", "0", "10"),
    "min_scale": (lambda: Overflow(min_scale=0.0), "min_scale", "> 0", "0.0", "1.0"),
    "detectors-one": (lambda: guard(detectors=Named()), "detectors", "a list or tuple", "<", "`detectors=[...]`"),
    "detectors-text": (own("explosion"), "detectors", "instances of Detector", "'explosion'", "Derive from"),
    "detectors-class": (own(Named), "detectors", "instances of Detector", "<class", "Derive from"),
    "detector-nameless": (own(Nameless()), "name", "a non-empty string", "''", 'name = "my_detector"'),
    "detector-name-number": (own(NumberedName()), "name", "a non-empty string", "3", 'name = "my_detector"'),
    "detector-name-taken": (own(Taken()), "name", "unique", "'explosion'", "explosion=Explosion(...)"),
    "detector-twice": (lambda: guard(detectors=[Named(), Named()]), "name", "unique", "'named'", "own keyword"),
    "sinks": (lambda: guard(sinks=[3]), "sinks", "objects with `write(record)`", "3", "functions of a record"),
    "sinks-half": (lambda: guard(sinks=[Half()]), "sinks", "and `close()`", "<", "functions of a record"),
    "log_every": (lambda: guard(log_every_n_steps=-1), "log_every_n_steps", ">= 0", "-1", "pass 0"),
    "log_every-none": (lambda: guard(log_every_n_steps=None), "log_every_n_steps", ">= 0", "None", "pass 0"),
    "histogram_every": (lambda: guard(histogram_every_n_steps=0), "histogram_every_n_steps", ">= 1", "0", "pass None"),
    "callback-log_every": (lambda: GradGuard(log_every_n_steps=-1), "log_every_n_steps", ">= 0", "-1", "pass None"),
    "callback-clip": (lambda: GradGuard(clip=-1.0), "clip", "> 0", "-1.0", "pass `clip=None`"),
    "parameters-odd": (
        lambda: Guard([("a", 3)]),
        "named_parameters",
        "pairs of a name and a tensor",
        "a tuple",
        "model.named_parameters()",
    ),
    "parameters-none": (lambda: Guard([]), "named_parameters", "at least one parameter", "none", "model.named_parameters()"),
}


@pytest.mark.parametrize(("call", "parameter", "constraint", "value", "remedy"), CASES.values(), ids=CASES)
def test_bad_value_error_says_what_is_wrong_and_what_to_do(call, parameter, constraint, value, remedy):
    """All four are in the message, in this order."""
    with pytest.raises(ValueError, match=f"`{parameter}`") as caught:
        call()
    message = str(caught.value)
    rest = message[message.index(f"`{parameter}`") :]
    for part in (
        " must ",
        constraint,
        "got ",
        value,
    ):
        assert part in rest, message
    assert remedy in message


def test_detector_without_policy_error_names_the_call_that_is_missing():
    """Its `__init__` did not call its base class."""
    with pytest.raises(ValueError, match=r"Detector NoPolicy has no `policy`\. Call `super\(\)\.__init__\(action"):
        own(NoPolicy())()


def test_parameters_used_up_error_says_so():
    """An iterator that has been walked through is empty."""
    named = mlp(2, 1).named_parameters()
    Guard(named)
    with pytest.raises(ValueError, match="an iterator can be used up only once"):
        Guard(named)


@pytest.mark.parametrize(
    ("clip", "shown"),
    [(2, "ClipNorm(max_norm=2.0, norm_type=2.0)"), (ClipValue(0.5), "ClipValue(clip_value=0.5)"), (None, "None")],
)
def test_clip_good_values_are_taken(clip, shown):
    """A number, a clipper, or nothing: a control for the table above."""
    assert repr(Settings.of(**DEFAULTS | {"clip": clip}).clipper) == shown


@pytest.mark.parametrize("value", ["warn", Action.STOP, Explosion("skip", max_norm=1, ratio=None), None])
def test_explosion_good_values_are_taken(value):
    """A name, an action, a detector, or None for off."""
    names = [detector.name for detector in Settings.of(**DEFAULTS | {"explosion": value}).detectors]
    assert ("explosion" in names) == (value is not None)


def test_built_in_name_is_kept_for_the_built_in_detector():
    """Also where it is switched off: its alerts' kind has one meaning."""
    with pytest.raises(ValueError, match="must be unique"):
        guard(explosion=None, detectors=[Taken()])

"""Saved states of any version, and damaged ones, made such that they can be loaded.

A checkpoint may come from an earlier release, from a later one, or have been tampered with. A part that is sound is kept as
it is. One that is missing or damaged becomes that of a run that begins, and a warning says so; so nothing in a checkpoint
ends a training, and nothing sound is lost for what isn't.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from lightning_gradguard.alert import Alert
from lightning_gradguard.clippers import Clipper
from lightning_gradguard.detectors import Detector
from lightning_gradguard.errors import GuardWarning, type_and_text
from lightning_gradguard.judge.decision import Streak
from lightning_gradguard.layout import Layout
from lightning_gradguard.measure.gradients import Gradients
from lightning_gradguard.record import Measurement, Totals

VERSION = 1
"""Of what `GradGuard` and `Guard` save. States without one are of the development before release 0.1.0, and alike."""

_MAX_PROBLEMS = 5


class Mending:
    """Reads one saved state part by part, and gathers what was wrong with it.

    Args:
        state: anything.
        name: of the state, for the warning.
        known: the fields that it may have.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     with_default = Mending({"n": -1, "m": 2}, "the counts", known=("n",))
    ...     print(with_default.part("n", is_count, 0))
    ...     with_default.warn()
    0
    >>> str(caught[0].message)
    'In the checkpoint, the counts: unknown field `m` is ignored; `n` is damaged and starts afresh. All else is restored.'
    """

    def __init__(self, state: Any, name: str, *, known: Sequence[str]) -> None:
        self._name = name
        self._problems: list[str] = []
        self._is_lost = not isinstance(state, Mapping)
        self._state: Mapping[str, Any] = {} if self._is_lost else state
        if self._is_lost:
            self._problems.append("all of it is damaged, and starts afresh")
            return
        version = state.get("version", VERSION)
        if not is_count(version):
            self._problems.append("its version is damaged; what is known of it is used")
        elif version > VERSION:
            self._problems.append("it was saved by a later version of lightning_gradguard; what is known of it is used")
        for field in state.keys() - {"version", *known}:
            self.note(f"unknown field `{str(field)[:40]}` is ignored")

    def part(self, name: str, is_sound: Callable[[Any], bool], default: Any, *, may_be_missing: bool = False) -> Any:
        """One field, or the default where it is missing or not sound."""
        if name not in self._state:
            if not self._is_lost and not may_be_missing:
                self.note(f"`{name}` is missing and starts afresh")
            return default
        value = self._state[name]
        if not is_sound(value):
            self.note(f"`{name}` is damaged and starts afresh")
            return default
        return value

    def note(self, problem: str) -> None:
        """One more thing that was wrong."""
        self._problems.append(problem)

    def warn(self) -> None:
        """Say what was wrong, if something was."""
        if self._problems:
            some = "; ".join(self._problems[:_MAX_PROBLEMS])
            more = f"; and {len(self._problems) - _MAX_PROBLEMS} more" if len(self._problems) > _MAX_PROBLEMS else ""
            rest = "" if self._is_lost else " All else is restored."
            warnings.warn(f"In the checkpoint, {self._name}: {some}{more}.{rest}", GuardWarning, stacklevel=3)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 on."""
    return type(value) is int and value >= 0


def mended_guard_state(state: Any, detectors: Sequence[Detector], clipper: Clipper | None, layout: Layout) -> dict[str, Any]:
    """What `Pipeline.load_state_dict` can take without a look at it.

    Args:
        state: from a checkpoint.
        detectors: as they are now.
        clipper: as it is now.
        layout: of the parameters as they are now.
    """
    mending = Mending(state, "the state of a guard", known=("version", "judge", "clipper", "updates", "totals"))
    judge = mending.part("judge", _is_mapping, {})
    saved = judge.get("detectors", {})
    mended = {
        "judge": {
            "num_steps": judge["num_steps"] if is_count(judge.get("num_steps")) else 0,
            "detectors": {
                detector.name: _mended_detector(detector, saved[detector.name], layout, mending)
                for detector in detectors
                if _is_mapping(saved) and detector.name in saved
            },
        },
        "clipper": mending.part("clipper", lambda value: value is None or _is_part(value), None),
        "updates": mending.part("updates", lambda value: _is_updates(value, layout), {"ratios": None}),
        "totals": _mended_totals(mending.part("totals", _is_mapping, {}), mending),
    }
    if judge and not (is_count(judge.get("num_steps")) and _is_mapping(saved)):
        mending.note("the judge's counts of steps are damaged and start afresh")
    if clipper is not None and mended["clipper"] is not None and mended["clipper"]["type"] == type(clipper).__qualname__:
        problem = _problem_of(clipper, mended["clipper"]["state"], lambda trial: _try_clipper(trial, layout))
        if problem is not None:
            mending.note(f"the history of the clipper is damaged ({problem}) and starts afresh")
            mended["clipper"] = {"type": type(clipper).__qualname__, "state": copy.deepcopy(clipper).state_dict()}
    mending.warn()
    return mended


def mended_alerts(entries: Any) -> list[Alert]:
    """The alerts of a checkpoint; what is none is passed over."""
    found = entries if isinstance(entries, (list, tuple)) else ()
    return [alert for entry in found if (alert := _alert_in(entry)) is not None]


def _alert_in(entry: Any) -> Alert | None:
    try:
        return Alert.from_dict(entry)
    except (TypeError, ValueError):
        return None


def _mended_detector(detector: Detector, saved: Any, layout: Layout, mending: Mending) -> dict[str, Any]:
    kind = type(detector).__qualname__
    streak = Streak().state_dict()
    fresh = {"type": kind, "state": copy.deepcopy(detector).state_dict(), "streak": streak}
    if not _is_part(saved):
        mending.note(f"the state of detector `{detector.name}` is damaged and starts afresh")
        return fresh
    if saved["type"] != kind:
        return {**saved, "streak": streak}  # whoever restores it says that it is another one now
    problem = _problem_of(detector, saved["state"], lambda trial: _try_detector(trial, layout))
    if problem is not None:
        mending.note(f"the state of detector `{detector.name}` is damaged ({problem}) and starts afresh")
        return fresh
    if (known := _streak_in(saved.get("streak"))) is None:
        mending.note(f"the streak of detector `{detector.name}` is damaged and starts afresh")
    return {**saved, "streak": known or streak}


def _mended_totals(saved: Mapping[str, Any], mending: Mending) -> dict[str, Any]:
    fresh = Totals()
    known = {entry.name for entry in fields(Totals)}
    totals: dict[str, Any] = {}
    for name in known:
        value = saved.get(name, getattr(fresh, name))
        is_sound = _is_counts_by_name(value) if name == "alerts_by_kind" else is_count(value)
        if not is_sound or (saved and name not in saved):
            mending.note(f"the count `{name}` is {'missing' if name not in saved else 'damaged'} and starts afresh")
        totals[name] = value if is_sound else getattr(fresh, name)
    for name in saved.keys() - known:
        mending.note(f"unknown count `{str(name)[:40]}` is ignored")
    totals["alerts_by_kind"] = dict(totals["alerts_by_kind"])
    return totals


def _problem_of(part: Detector | Clipper, state: Any, try_out: Callable[[Any], None]) -> str | None:
    """Why a part can't go on from a state, found out on a copy of it; None if it can."""
    try:
        trial = copy.deepcopy(part)
        trial.load_state_dict(copy.deepcopy(state))
        if _is_own(part):
            _refuse_nan(state)
            _refuse_other_types(state, copy.deepcopy(part).state_dict())
            try_out(trial)
    except Exception as error:  # noqa: BLE001 - a damaged state may raise anything
        return type_and_text(error)[:80]
    return None


def _is_own(part: object) -> bool:
    """Whether it is of this package: what somebody else's detector does when it is tried out, nobody knows."""
    return type(part).__module__.partition(".")[0] == __package__


def _try_detector(trial: Detector, layout: Layout) -> None:
    number = len(layout.names)
    measurement = Measurement(
        layout,
        np.ones(number),
        np.ones(number, dtype=np.bool_),
        math.sqrt(number),
        loss=1.0,
        update_ratios=np.full(number, 1e-3),
    )
    trial.needs_update()
    trial.observe(measurement)
    trial.learn(measurement)
    trial.limit()
    trial.state_dict()


def _try_clipper(trial: Clipper, layout: Layout) -> None:
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in layout.names]
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    with torch.no_grad():
        trial.clip_(Gradients(parameters, names=layout.names), torch.tensor(math.sqrt(len(parameters))))
    trial.state_dict()


def _refuse_nan(state: Any) -> None:
    """A value that is not finite never enters a baseline, so there is none in a sound one."""
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for entry in state:
            _refuse_nan(entry)
    elif isinstance(state, float) and math.isnan(state):
        raise ValueError("it holds NaN")


def _refuse_other_types(saved: Any, present: Any) -> None:
    """What is a number, a text or a list in the state of a part that begins is one in every other."""
    if isinstance(present, Mapping) and isinstance(saved, Mapping):
        for key in present.keys() & saved.keys():
            _refuse_other_types(saved[key], present[key])
        return
    if saved is None and not (isinstance(present, (int, float)) and present == 0):
        return  # what is not a count may be None, too, where nothing is known
    for kind in ((bool,), (int, float), (str,), (list, tuple), (Mapping,)):
        if isinstance(present, kind):
            if not isinstance(saved, kind):
                raise TypeError(f"{type(saved).__name__} in the place of {kind[0].__name__}")
            return


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_part(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("type"), str) and isinstance(value.get("state"), Mapping)


def _streak_in(saved: Any) -> dict[str, Any] | None:
    """A streak as it is saved now, of one in this layout or an earlier one; None if it is damaged."""
    fresh = Streak().state_dict()
    if isinstance(saved, Mapping):
        saved = {name: saved.get(name, value) for name, value in fresh.items()}
    try:
        streak = Streak.from_state(saved).state_dict()
    except Exception:  # noqa: BLE001 - a damaged state may raise anything
        return None
    numbers = {name: value for name, value in streak.items() if name != "alerted_action"}
    is_sound = all(is_count(value) or (value is None and fresh[name] is None) for name, value in numbers.items())
    return streak if is_sound else None


def _is_counts_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and is_count(it) for key, it in value.items())


def _is_updates(value: Any, layout: Layout) -> bool:
    ratios = value.get("ratios", "") if isinstance(value, Mapping) else ""
    is_list = isinstance(ratios, list) and all(type(ratio) is float for ratio in ratios)
    return ratios is None or (is_list and len(ratios) == len(layout.names))

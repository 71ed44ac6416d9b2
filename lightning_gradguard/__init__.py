"""GradGuard: one callback that inspects every backward pass of a Lightning training.

Importing the package loads neither torch nor lightning; each public name is loaded when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradguard.alert import Alert, Culprit
    from lightning_gradguard.callback import GradGuard
    from lightning_gradguard.clippers import (
        AGC,
        AdaGC,
        AutoClip,
        ClipNorm,
        ClipParameterNorm,
        Clipper,
        ClipValue,
        Grouped,
        ZClip,
    )
    from lightning_gradguard.detectors import Detector, Explosion, NonFinite, Overflow, UpdateRatio, Vanishing
    from lightning_gradguard.errors import GradientError, GradientWarning, GuardWarning, SinkWarning
    from lightning_gradguard.guard import Guard
    from lightning_gradguard.policy import Action
    from lightning_gradguard.record import Decision, Measurement, Position, Record, Verdict
    from lightning_gradguard.recovery import Rollback
    from lightning_gradguard.sinks import Notify, Sink

__version__ = "0.1.0"

__all__ = [
    "AGC",
    "Action",
    "AdaGC",
    "Alert",
    "AutoClip",
    "ClipNorm",
    "ClipParameterNorm",
    "ClipValue",
    "Clipper",
    "Culprit",
    "Decision",
    "Detector",
    "Explosion",
    "GradGuard",
    "GradientError",
    "GradientWarning",
    "Grouped",
    "Guard",
    "GuardWarning",
    "Measurement",
    "NonFinite",
    "Notify",
    "Overflow",
    "Position",
    "Record",
    "Rollback",
    "Sink",
    "SinkWarning",
    "UpdateRatio",
    "Vanishing",
    "Verdict",
    "ZClip",
]

_MODULE_OF = {
    "callback": ["GradGuard"],
    "clippers": ["AGC", "AdaGC", "AutoClip", "ClipNorm", "ClipParameterNorm", "ClipValue", "Clipper", "Grouped", "ZClip"],
    "detectors": ["Detector", "Explosion", "NonFinite", "Overflow", "UpdateRatio", "Vanishing"],
    "errors": ["GradientError", "GradientWarning", "GuardWarning", "SinkWarning"],
    "guard": ["Guard"],
    "policy": ["Action"],
    "alert": ["Alert", "Culprit"],
    "record": ["Decision", "Measurement", "Position", "Record", "Verdict"],
    "recovery": ["Rollback"],
    "sinks": ["Notify", "Sink"],
}
_HOME = {name: module for module, names in _MODULE_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
